"""Random numbers as pure functions of whole numbers, such as a seed and a step."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

BLOCK = 500
"""Rows that `indexed_samples` draws at once."""


def seeded_generator(*numbers: int) -> torch.Generator:
    """Create a CPU generator whose state is a pure function of whole numbers (0 or more)."""
    state = np.random.SeedSequence(numbers).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def indexed_samples(sample_block: Callable[[int], Tensor], n: int, start: int) -> Tensor:
    """Return rows start to start + n of an endless sequence; a row depends on its index only.

    Args:
        sample_block: Returns block number i of the sequence, BLOCK rows.
        n: Number of rows.
        start: Index of the first row.
    """
    first, last = start // BLOCK, -(-(start + max(n, 1)) // BLOCK)
    blocks = torch.cat([sample_block(number) for number in range(first, last)])
    return blocks[start - first * BLOCK :][:n]
