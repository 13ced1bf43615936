"""Random inputs of one training step: a pure function of (seed, step, D step).

They are drawn on the CPU for the global batch, and each rank takes its rows. So the result does
not depend on the number of workers.
"""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.cuda_graph import map_tensors
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


class NoiseSampler:
    """Samples the noise of each step; on a GPU the next step's, while the GPU computes this one.

    Args:
        config: See `sample_step_noise`, as of `shape` and `decoder_noise_dim`.
        shape: Height, width and channels.
        decoder_noise_dim: Further noise of G's decoder.
        device: Device of the noise.
        dtype: Type of the noise, except for packed bits.
    """

    def __init__(
        self,
        config: GANConfig,
        shape: tuple[int, int, int],
        decoder_noise_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        self._settings = config, shape, decoder_noise_dim
        self.device, self.dtype = device, dtype
        self._prepared: dict[tuple[int, int], list[StepNoise]] = {}

    def sample(self, step: int, batch_size: int) -> list[StepNoise]:
        """Return this rank's rows of a step's noise for each step of D; see `sample_step_noise`."""
        noise = self._prepared.pop((step, batch_size), None) or self._draw(step, batch_size)
        self._prepared.clear()
        move = partial(Tensor.to, device=self.device, non_blocking=True)
        return [map_tensors(move, of_step) for of_step in noise]

    def prepare(self, step: int, batch_size: int) -> None:
        """Draw a step's noise before it is asked for, where another device is at work."""
        if self.device.type != "cpu":
            self._prepared = {(step, batch_size): self._draw(step, batch_size)}

    def _draw(self, step: int, batch_size: int) -> list[StepNoise]:
        noise = sample_step_noise(*self._settings, step, batch_size, self.dtype)
        if self.device.type != "cuda":
            return noise
        return [map_tensors(Tensor.pin_memory, of_step) for of_step in noise]


def sample_step_noise(
    config: GANConfig,
    shape: tuple[int, int, int],
    decoder_noise_dim: int,
    step: int,
    batch_size: int,
    dtype: torch.dtype,
) -> list[StepNoise]:
    """Sample this rank's rows of the noise of the global batch, for each of the steps of D.

    Args:
        config: Seed, latent dimension, views, augmentation and number of D's steps.
        shape: Height, width and channels of an image.
        decoder_noise_dim: Further noise that G's decoder takes for an image.
        step: Steps taken before this one.
        batch_size: Pairs of each rank, b.
        dtype: Type of the result, except for the packed bits.
    """
    rank, workers = distributed.world()
    total, rows = workers * batch_size, slice(rank * batch_size, (rank + 1) * batch_size)

    def local(samples: Iterable[Tensor]) -> Tensor:
        """Concatenate this rank's rows of each part."""
        return torch.cat([part[rows].to(dtype) for part in samples])

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
            PenaltyNoise(bits, local([alpha])),
            *augmentations,
        )

    return [sample(d_step) for d_step in range(config.optimizer.d_steps)]
