"""Whom each of a rank's vectors is set against: all vectors of the global batch but itself."""

from typing import NamedTuple

import torch
from torch import Tensor

from cl_ray import distributed


class GatheredNegatives(NamedTuple):
    """The global batch, seen from this rank.

    Args:
        vectors: Of all ranks, [k N b, d], part by part, with gradient through all of them.
        here: Bool [k N b], false where a row only fills the last batch up.
        itself: Where this rank's own vectors, part by part, lie among them, [k b].
    """

    vectors: Tensor
    here: Tensor
    itself: Tensor


def gather_negatives(parts: Tensor, present: Tensor) -> GatheredNegatives:
    """Gather vectors [k, b, d], k of each of this rank's b pairs, of which `present` [b] count."""
    rank, workers = distributed.world()
    count, local = parts.shape[:2]
    vectors = distributed.gather(parts.transpose(0, 1)).transpose(0, 1).flatten(0, 1)
    here = distributed.gather(present.to(parts.dtype)).bool().repeat(count)
    number = torch.arange(count * local, device=parts.device)
    itself = (number // local) * workers * local + rank * local + number % local
    return GatheredNegatives(vectors, here, itself)
