"""Forward passes of G and D in a training step, with results by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.batch import (
    DiscriminatorInput,
    DiscriminatorOutput,
    DiscriminatorPass,
    FakeParts,
    GeneratorOutput,
    PairBatch,
    RealParts,
)
from cl_ray.data.views import ViewParams, apply_views
from cl_ray.errors import UserError
from cl_ray.losses.adversarial import Scores
from cl_ray.losses.config import LossConfig
from cl_ray.losses.contrastive import view_embeddings
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator
from cl_ray.networks.normalize import to_unit
from cl_ray.step_noise import StepNoise


def normalize_batch(batch: PairBatch, dtype: torch.dtype) -> PairBatch:
    """Convert the images of a batch to [-1, 1], [b, C, H, W]."""
    positive, partner, negative = (to_unit(images, dtype) for images in batch[:3])
    return batch._replace(positive=positive, partner=partner, negative=negative)


@torch.no_grad()
def predict_classes(discriminator: Discriminator, images: Tensor) -> Tensor:
    """Predict the classes [n] of images [n, C, H, W]; spectral norm is not updated."""
    was_training = discriminator.training
    discriminator.eval()
    logits = discriminator.classify(discriminator.features(images))
    discriminator.train(was_training)
    return logits.argmax(1)


def predict_missing_labels(discriminator: Discriminator, batch: PairBatch) -> PairBatch:
    """Give the unlabelled images of a normalized batch the class that D predicts, for G.

    Lucic et al. (2019, S3GAN), section 3: co-training, with D's own classifier.
    """
    if batch.labels is None or batch.labelled is None:
        return batch
    if discriminator.is_projection:
        raise UserError(
            "condition projection needs a label of every image, as its D predicts none: use "
            "condition classifier, or data whose images all have one."
        )
    predicted = predict_classes(discriminator, torch.cat(batch.real)).view(2, -1).T
    return batch._replace(labels=torch.where(batch.labelled, batch.labels, predicted))


def generate(generator: Generator, batch: PairBatch, noise: StepNoise) -> GeneratorOutput:
    """Compute the fakes and latent vectors of a normalized batch."""
    dtype, labels = batch.positive.dtype, batch.fake_labels
    images, latents = generator(
        torch.cat(batch.real),
        noise.z,
        noise.latent_noise,
        noise.decoder_noise,
        None if labels is None else labels.flatten(),
    )
    fake = FakeParts(*images.to(dtype).chunk(3))
    return GeneratorOutput(fake, latents.to(dtype).view(2, len(batch.positive), -1))


def discriminate(
    discriminator: Discriminator, seen: DiscriminatorInput, batch: PairBatch
) -> DiscriminatorPass:
    """Compute D's output for all that it sees in its step: one pass, split by name."""
    parts = [*seen.real, *seen.fake, *seen.views]
    labels = None if batch.part_labels is None else batch.part_labels[: len(parts)]
    contrad = discriminator.fake_projection is not None
    outputs = _forward(discriminator, parts, labels, detach_scores=contrad)
    return DiscriminatorPass(RealParts(*outputs[:2]), FakeParts(*outputs[2:5]), tuple(outputs[5:]))


def gather_vectors(
    d: DiscriminatorPass, g: GeneratorOutput, batch: PairBatch, config: LossConfig
) -> DiscriminatorPass:
    """Gather the vectors of all ranks that losses compare pair with pair, in one operation."""
    vectors = view_embeddings(d, config) | {"latents": g.latents}
    if batch.labelled is not None:
        vectors["labelled"] = batch.labelled.T[..., None].to(g.latents.dtype)
    return d._replace(gathered=distributed.gather(vectors))


def discriminate_fakes(
    discriminator: Discriminator,
    fake: FakeParts[Tensor],
    batch: PairBatch,
    noise: StepNoise,
    score_real: bool,
) -> tuple[FakeParts[DiscriminatorOutput], Scores]:
    """Compute D's output for the fakes in G's step, and the scores that G's loss depends on.

    `score_real`: whether these include the scores of real images (RELATIVISTIC objectives).
    """
    augmented = augment(fake, noise.g_augmentation.fake)
    d_fake = FakeParts(*_forward(discriminator, augmented, batch.fake_labels))
    d_real = None
    if score_real:
        with torch.no_grad():
            augmented = augment(batch.real, noise.g_augmentation.real)
            d_real = RealParts(*_forward(discriminator, augmented, batch.real_labels))
    return d_fake, Scores.stack(d_fake, d_real)


def discriminator_input(
    batch: PairBatch, fake: FakeParts[Tensor], noise: StepNoise
) -> DiscriminatorInput:
    """Augment what D sees in its step, detached from G, and make the views of x+."""
    real = augment(batch.real, noise.d_augmentation.real)
    detached = augment([part.detach() for part in fake], noise.d_augmentation.fake)
    views: tuple[Tensor, ...] = ()
    if noise.view1:
        views = (*augment([batch.positive], noise.view1), *augment([batch.partner], noise.view2))
    return DiscriminatorInput(RealParts(*real), FakeParts(*detached), views)


def augment(parts: Sequence[Tensor], views: ViewParams | None) -> Sequence[Tensor]:
    """Apply differentiable augmentation (Zhao et al., 2020, section 3), if there is any."""
    if views is None:
        return parts
    images = torch.cat(list(parts))
    with torch.autocast(images.device.type, enabled=False):  # bfloat16 misses by 0.1 pixels
        return apply_views(images, views).chunk(len(parts))


def _forward(
    discriminator: Discriminator,
    parts: Sequence[Tensor],
    labels: Tensor | None,
    detach_scores: bool = False,
) -> list[DiscriminatorOutput]:
    """Compute D's output for k parts [b, C, H, W] of classes [k, b]."""
    flat_labels = None if labels is None else labels.flatten()
    output: DiscriminatorOutput = discriminator(torch.cat(list(parts)), flat_labels, detach_scores)
    return output.split(len(parts))
