"""Forward passes of G and D in a training step, with results by name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from cl_ray.batch import (
    DiscriminatorInput,
    DiscriminatorOutput,
    DiscriminatorPass,
    FakeParts,
    PairBatch,
    RealParts,
    stack_scores,
)
from cl_ray.data.views import ViewParams, apply_views
from cl_ray.losses.adversarial import Scores
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator
from cl_ray.step_noise import StepNoise


def generate(
    generator: Generator, batch: PairBatch, noise: StepNoise
) -> tuple[FakeParts[Tensor], Tensor]:
    """Compute G(x+), G(x-) and G(z), and the latent vectors of x+ and x-, [2, b, latent]."""
    dtype, labels = batch.positive.dtype, batch.fake_labels
    images, latents = generator(
        torch.cat(batch.real),
        noise.z,
        noise.latent_noise,
        noise.decoder_noise,
        None if labels is None else labels.flatten(),
    )
    fake = FakeParts(*images.to(dtype).chunk(3))
    return fake, latents.to(dtype).view(2, len(batch.present), -1)


def discriminate(
    discriminator: Discriminator, seen: DiscriminatorInput, batch: PairBatch
) -> DiscriminatorPass:
    """Compute D's output for all that it sees in its step: one pass, split by name."""
    parts = [*seen.real, *seen.fake, *seen.views]
    labels = None if batch.part_labels is None else batch.part_labels[: len(parts)]
    contrad = discriminator.fake_projection is not None
    outputs = _forward(discriminator, parts, labels, detach_scores=contrad)
    return DiscriminatorPass(RealParts(*outputs[:2]), FakeParts(*outputs[2:5]), tuple(outputs[5:]))


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
    real_scores = None
    if score_real:
        with torch.no_grad():
            augmented = augment(batch.real, noise.g_augmentation.real)
            real = RealParts(*_forward(discriminator, augmented, batch.real_labels))
            real_scores = stack_scores(real)
    return d_fake, Scores(stack_scores(d_fake), real_scores)


def discriminator_input(
    batch: PairBatch, fake: FakeParts[Tensor], noise: StepNoise
) -> DiscriminatorInput:
    """Augment what D sees in its step, detached from G, and make the views of x+."""
    augmentation = noise.d_augmentation
    return DiscriminatorInput(
        RealParts(*augment(batch.real, augmentation.real)),
        FakeParts(*augment([part.detach() for part in fake], augmentation.fake)),
        (
            *augment([batch.positive], noise.view1),
            *augment([batch.partner], noise.view2),
        )
        if noise.view1
        else (),
    )


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
