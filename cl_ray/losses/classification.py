"""The class loss of an auxiliary classifier."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cl_ray.batch import DiscriminatorOutput


def auxiliary_classification(
    outputs: Sequence[DiscriminatorOutput], labels: Tensor | None
) -> Tensor:
    """Compute -log P(c | image) of D's class logits.

    Odena et al. (2017), one half of equation 3: D minimizes it on real images and on fakes, G on
    its fakes.

    Args:
        outputs: D of k images of each of b pairs.
        labels: The classes that the images have or were generated for, int64 [k, b].

    Returns:
        [b], the mean over the k images.
    """
    assert labels is not None, "an auxiliary classifier is trained on labels"
    logits = [output.class_logits for output in outputs if output.class_logits is not None]
    loss = cross_entropy(torch.cat(logits), labels.flatten(), reduction="none")
    return loss.view(labels.shape).mean(0)
