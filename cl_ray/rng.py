"""What a step draws: a pure function of (seed, step, turn), the same however many workers share it.

Drawn for the global batch on the CPU; each rank takes its rows.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.data.views import ViewParams, sample_views
from cl_ray.losses.penalties import sample_rademacher
from cl_ray.train_config import GANConfig


class StepNoise(NamedTuple):
    """What a step draws, a rank's rows of it.

    Args:
        noise: z, [b, latent].
        moves: What moves the latent vectors of x+ and x-, [2 b, latent].
        first: One view of x+.
        second: Another, of its partner.
        extras: Further numbers that G takes for f+, f- and fz, [3 b, extras]; None if none.
        signs: Directions in which D's slope is taken, as `draw_signs` draws them.
        shares: Where between a real image and a fake it is taken, [b] in [0, 1].
        shown: Views through which D sees x+, x-, f+, f- and fz, [5 b]; None if as they are.
        shown_next: The same for G's step.
    """

    noise: Tensor
    moves: Tensor
    first: ViewParams
    second: ViewParams
    extras: Tensor | None
    signs: Tensor
    shares: Tensor
    shown: ViewParams | None
    shown_next: ViewParams | None


BLOCK = 500
"""What is numbered is drawn so many at once, so that more of it begins with the same."""


def indexed_samples(block: Callable[[int], Tensor], n: int, start: int) -> Tensor:
    """Rows number `start` on, n of them, of what blocks of BLOCK rows each are put together."""
    first, last = start // BLOCK, -(-(start + max(n, 1)) // BLOCK)
    drawn = torch.cat([block(number) for number in range(first, last)])
    return drawn[start - first * BLOCK :][:n]


def seeded_generator(*numbers: int) -> torch.Generator:
    """A CPU random generator that is a pure function of some whole numbers."""
    state = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def sample_step_noise(
    config: GANConfig,
    shape: tuple[int, int, int],
    extras: int,
    step: int,
    turn: int,
    local: int,
    device: torch.device,
    dtype: torch.dtype,
) -> StepNoise:
    """This rank's rows of what is drawn for the global batch.

    Args:
        config: The config tree; of it the seed, the latent space, views and augmentation.
        shape: Height, width and channels of an image.
        extras: Further numbers that G takes for an image.
        step: Steps that were taken before.
        turn: Which of D's steps within this one.
        local: Pairs of each rank.
        device: Where they are wanted.
        dtype: Of all but the signs.
    """
    rank, workers = distributed.world()
    total, rows = workers * local, slice(rank * local, (rank + 1) * local)
    random = seeded_generator(config.seed, step, turn)
    noise, *moves = torch.randn(3, total, config.generator.latent, generator=random)
    first = sample_views(config.views, total, random)
    second = sample_views(config.views, total, random)
    directions = sample_rademacher(total, shape, random)[rows].to(device, non_blocking=True)
    shares = torch.rand(total, generator=random)

    def here(drawn: Tensor) -> Tensor:
        return drawn[rows].to(device, dtype, non_blocking=True)

    views = ViewParams(*map(here, first)), ViewParams(*map(here, second))
    moved = torch.cat([here(move) for move in moves])
    shown: list[ViewParams | None] = [None, None]
    if config.augment.used:
        shown = [
            ViewParams(*(torch.cat([here(part) for part in drawn.chunk(5)]) for drawn in views))
            for views in (sample_views(config.augment, 5 * total, random) for _ in range(2))
        ]
    further = None
    if extras:
        parts = torch.randn(3, total, extras, generator=random)
        further = torch.cat([here(part) for part in parts])
    return StepNoise(here(noise), moved, *views, further, directions, here(shares), *shown)
