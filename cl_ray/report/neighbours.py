"""The real images nearest to generated ones: are any of them copies?

By pixels, Euclidean, scaled to [0, 1]: a copy is then at distance 0 whatever any network makes of
it, and no features are needed, so that it is the same question for every data set.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cl_ray.report.pictures import Pixels

BLOCK = 2000
"""Real images that are compared at once."""


@dataclass(frozen=True)
class NearestPixels:
    """The k nearest of a bank of images.

    Args:
        rows: [n, k], nearest first.
        distances: [n, k].
    """

    rows: NDArray[np.int64]
    distances: NDArray[np.float64]


def nearest_pixels(bank: Pixels, queries: Pixels, k: int) -> NearestPixels:
    """Of each query [n, H, W, C] the k nearest images of the bank [N, H, W, C], exactly."""
    q = _flat(queries)
    best = torch.empty(len(q), 0, dtype=q.dtype)
    rows = torch.empty(len(q), 0, dtype=torch.long)
    for start in range(0, len(bank), BLOCK):
        # Whole numbers, whose squares and sums are exact in float64: a copy is at distance 0.
        part = _flat(bank[start : start + BLOCK])
        squares = q.square().sum(1)[:, None] + part.square().sum(1) - 2 * q @ part.T
        best = torch.cat([best, squares], 1)
        rows = torch.cat([rows, torch.arange(start, start + len(part)).expand(len(q), -1)], 1)
        best, order = best.topk(min(k, best.shape[1]), largest=False)
        rows = rows.gather(1, order)
    return NearestPixels(rows.numpy(), best.sqrt().div(255).numpy())


def _flat(images: Pixels) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).flatten(1).double()
