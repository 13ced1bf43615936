"""What naming the class of an image is worth."""

from torch import Tensor
from torch.nn.functional import cross_entropy


def auxiliary_classification(logits: Tensor, labels: Tensor) -> Tensor:
    """-log P(c | image), the class c that each image was made or taken for.

    Odena et al. (2017), one half of equation 3: D minimises it of real images and of fakes, G of
    its fakes.

    Args:
        logits: Of each class, [k, b, classes], k images of each of b pairs.
        labels: The classes, int64 [k, b].

    Returns:
        [b], the mean over the k images.
    """
    flat = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return flat.view(labels.shape).mean(0)
