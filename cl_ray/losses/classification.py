"""The class losses of an auxiliary classifier, where some or all images have a label."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from cl_ray.batch import DiscriminatorOutput, DiscriminatorPass, Losses, PairBatch
from cl_ray.losses.config import LossConfig


def class_losses(d: DiscriminatorPass, batch: PairBatch, config: LossConfig) -> Losses:
    """Compute D's losses on classes: `classification` and, if images lack labels, `consistency`.

    With unlabelled images, D learns classes from real images and their views only: those of most
    fakes are its own predictions. Each loss is a mean over the images of the global batch that it
    is of: labelled ones, and x+ without a label.
    """
    if batch.labels is None or batch.labelled is None:
        of_real = auxiliary_classification(d.real, batch.real_labels)
        of_fake = auxiliary_classification(d.fake, batch.fake_labels)
        return {"classification": of_real + of_fake}

    def add_views(values: Tensor) -> Tensor:
        """Repeat values [2, n] of x+ and x- for the views of x+."""
        return torch.cat([values, values[:1].expand(len(d.views), -1)])

    present = batch.present.flatten()
    labelled = d.gathered["labelled"].squeeze(2) * present  # of all ranks, as numbers
    pairs, known = present.sum(), add_views(labelled).sum().clamp(min=1)
    images, labels = (*d.real, *d.views), add_views(batch.labels.T)
    weights = add_views(batch.labelled.T) * (pairs / known)
    losses = {"classification": auxiliary_classification(images, labels, weights)}
    if config.consistency and d.views:
        of_views = consistency(d.real.positive, d.views, config.confidence)
        unlabelled = (pairs - labelled[0].sum()).clamp(min=1)
        losses["consistency"] = of_views * ~batch.labelled[:, 0] * (pairs / unlabelled)
    return losses


def auxiliary_classification(
    outputs: Sequence[DiscriminatorOutput], labels: Tensor | None, weights: Tensor | None = None
) -> Tensor:
    """Compute -log P(c | image) of D's class logits.

    Odena et al. (2017), one half of equation 3: D minimizes it on real images and on fakes, G on
    its fakes.

    Args:
        outputs: D of k images of each of b pairs.
        labels: The classes that the images have or were generated for, int64 [k, b].
        weights: Weight of each image in the sum over k, [k, b]; None is the mean.

    Returns:
        [b], the weighted sum over the k images.
    """
    assert labels is not None, "an auxiliary classifier is trained on labels"
    logits = [output.class_logits for output in outputs if output.class_logits is not None]
    loss = cross_entropy(torch.cat(logits), labels.flatten(), reduction="none").view(labels.shape)
    return loss.mean(0) if weights is None else (loss * weights).sum(0)


def consistency(
    image: DiscriminatorOutput, views: Sequence[DiscriminatorOutput], confidence: float
) -> Tensor:
    """Compute the class loss of views by the confident predictions of the image itself.

    FixMatch (Sohn et al., 2020), equation 4; the image is its own weak augmentation.

    Args:
        image: D of b images.
        views: D of k views of each.
        confidence: Probability from which a prediction counts, tau.

    Returns:
        [b], the mean over the k views; 0 where the prediction is not confident.
    """
    assert image.class_logits is not None
    probability, predicted = image.class_logits.detach().softmax(1).max(1)
    loss = auxiliary_classification(views, predicted.expand(len(views), -1))
    return loss * (probability >= confidence)
