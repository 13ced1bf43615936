"""Which rows are whose: a pure function of (seed, epoch, workers, rank). Free of Ray and torch.

Processes that only cut and read, such as Ray Data's tasks, start seconds sooner without torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from cl_ray.data.config import PairDataConfig
from cl_ray.data.dataset import Dataset, RowRange

TRAIN_SPLIT = "train"
NOT_STREAMED = (
    "pairs.negatives `hard` needs D beside the images, and a shard that streams is paired "
    "elsewhere: raise shards.memory, take more workers, or use `far`."
)


@dataclass(frozen=True)
class Partition:
    """Which part of a dataset is whose: all that a rank's rows, order and pairs depend on.

    Args:
        dataset: The images at rest.
        config: The config tree; of it seed, batch size, pairs and shards.
        workers: How many ranks share the dataset.
        rank: Whose share this is.
    """

    dataset: Dataset
    config: PairDataConfig
    workers: int = 1
    rank: int = 0

    @property
    def local_batch_size(self) -> int:
        """Pairs in one of this rank's batches."""
        return self.config.batch_size // self.workers

    @property
    def steps(self) -> int:
        """Batches an epoch, alike on every rank; the last one may be short of rows."""
        rows = self.dataset.info.splits[TRAIN_SPLIT].rows
        return math.ceil(math.ceil(rows / self.workers) / self.local_batch_size)

    @cached_property
    def classes(self) -> list[str]:
        """The names of the labels where the config uses them, else none."""
        return self.dataset.class_names() if self.config.condition != "none" else []

    @cached_property
    def counts(self) -> list[int]:
        """How many training images each of the `classes` has."""
        return self.dataset.class_counts(TRAIN_SPLIT) if self.classes else []

    @property
    def gigabytes(self) -> float:
        """Size of the largest rank's pixels."""
        rows = math.ceil(self.dataset.info.splits[TRAIN_SPLIT].rows / self.workers)
        return rows * math.prod(self.dataset.info.shape) / 1e9

    @property
    def resident(self) -> bool:
        """Whether the share stays on the device; otherwise it streams."""
        return self.gigabytes <= self.config.shards.memory

    def pieces(self, epoch: int) -> list[RowRange]:
        """This rank's rows: an equal run, to one row, of all row groups in a random order.

        A resident share is that of epoch 0 for good. The order is alike on every rank, so the
        shares are disjoint and together the whole.
        """
        groups = self.dataset.pieces(TRAIN_SPLIT)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(groups))
        total = sum(piece.stop - piece.start for piece in groups)
        # Rounded up: rank 0 has the most, so its last batch, which is looked at, is never empty.
        first, end = (-(-total * r // self.workers) for r in (self.rank, self.rank + 1))
        return row_ranges([groups[i] for i in order], first, end)

    def windows(self, epoch: int) -> list[list[RowRange]]:
        """This rank's rows of a streamed epoch, in parts that are shuffled and paired together."""
        pieces = self.pieces(epoch)
        total = sum(piece.stop - piece.start for piece in pieces)
        count = max(1, round(total / self.config.shards.window))
        ends = [total * i // count for i in range(count + 1)]
        return [row_ranges(pieces, a, b) for a, b in pairwise(ends)]


def row_ranges(pieces: Sequence[RowRange], first: int, end: int) -> list[RowRange]:
    """The rows [first, end) of pieces laid one after another."""
    chosen, at = [], 0
    for piece in pieces:
        rows = piece.stop - piece.start
        start, stop = max(first - at, 0), min(end - at, rows)
        if start < stop:
            chosen.append(
                RowRange(piece.shard, piece.group, piece.start + start, piece.start + stop)
            )
        at += rows
    return chosen
