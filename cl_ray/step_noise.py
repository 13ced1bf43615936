"""Random inputs of one training step: a pure function of (seed, step, D step).

They are drawn on the CPU for the global batch, and each rank takes its rows. So the result does
not depend on the number of workers.
"""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.data.views import ViewParams, sample_views
from cl_ray.losses.penalties import PenaltyNoise, sample_rademacher
from cl_ray.rng import seeded_generator
from cl_ray.train_config import GANConfig


class Augmentation(NamedTuple):
    """Augmentation of the images that D sees.

    Args:
        real: Of x+ and x-, for 2 b images.
        fake: Of G(x+), G(x-) and G(z), for 3 b images.
    """

    real: ViewParams | None = None
    fake: ViewParams | None = None


class StepNoise(NamedTuple):
    """A rank's rows of the random inputs of one step of D, and of G's step after it.

    Args:
        z: Noise that G decodes, [b, latent].
        latent_noise: Unit noise for the latent vectors of x+ and x-, [2 b, latent].
        view1: One view of x+; None if no loss uses views.
        view2: Another view, of its partner.
        decoder_noise: Further noise of G's decoder for the three fakes, [3 b, decoder_noise_dim];
            None if it takes none.
        penalty: Random inputs of D's penalties.
        d_augmentation: What D sees in its step.
        g_augmentation: What D sees in G's step.
    """

    z: Tensor
    latent_noise: Tensor
    view1: ViewParams | None
    view2: ViewParams | None
    decoder_noise: Tensor | None
    penalty: PenaltyNoise
    d_augmentation: Augmentation
    g_augmentation: Augmentation


def sample_step_noise(
    config: GANConfig,
    shape: tuple[int, int, int],
    decoder_noise_dim: int,
    step: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
) -> list[StepNoise]:
    """Sample this rank's rows of the noise of the global batch, for each of the steps of D.

    Args:
        config: Seed, latent dimension, views, augmentation and number of D's steps.
        shape: Height, width and channels of an image.
        decoder_noise_dim: Further noise that G's decoder takes for an image.
        step: Steps taken before this one.
        batch_size: Pairs of each rank, b.
        device: Device of the result.
        dtype: Type of the result, except for the packed bits.
    """
    rank, workers = distributed.world()
    total, rows = workers * batch_size, slice(rank * batch_size, (rank + 1) * batch_size)

    def local(samples: Iterable[Tensor]) -> Tensor:
        """Concatenate this rank's rows of each part."""
        return torch.cat([part[rows].to(device, dtype, non_blocking=True) for part in samples])

    def local_views(views: ViewParams, parts: int = 1) -> ViewParams:
        return ViewParams(*(local(field.chunk(parts)) for field in views))

    def sample(d_step: int) -> StepNoise:
        random = seeded_generator(config.seed, step, d_step)
        z, *latent_noise = torch.randn(3, total, config.generator.latent, generator=random)
        views = [sample_views(config.views, total, random) for _ in range(2)]
        bits = sample_rademacher(total, shape, random)[rows]
        alpha = torch.rand(total, generator=random)
        augmentations = [Augmentation(), Augmentation()]
        if config.augment.used:
            samples = [sample_views(config.augment, 5 * total, random) for _ in range(2)]
            augmentations = [
                Augmentation(*local_views(views, parts=5).split(2 * batch_size))
                for views in samples
            ]
        decoder_noise = None
        if decoder_noise_dim:
            decoder_noise = local(torch.randn(3, total, decoder_noise_dim, generator=random))
        view1, view2 = map(local_views, views) if config.losses.uses_views else (None, None)
        return StepNoise(
            local([z]),
            local(latent_noise),
            view1,
            view2,
            decoder_noise,
            PenaltyNoise(bits.to(device, non_blocking=True), local([alpha])),
            *augmentations,
        )

    return [sample(d_step) for d_step in range(config.optimizer.d_steps)]
