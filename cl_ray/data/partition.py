"""Which rows each rank trains on: a pure function of (seed, epoch, workers, rank).

Imports neither torch nor ray: processes that only read, such as Ray Data's tasks, start faster.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cl_ray.data.config import PairDataConfig
from cl_ray.data.dataset import UNLABELLED, Dataset, RowBatch, RowGroups, RowRange

TRAIN_SPLIT = "train"
WINDOW_BYTES = 2**26
"""Pixels of a window of rows that stream, at most."""
HARD_NEGATIVES_NEED_MEMORY = (
    "pairs.negatives `hard` needs all images of a worker on its device, and they exceed "
    "shards.memory: raise it, take more workers, or use `far`."
)


@dataclass(frozen=True)
class Partition:
    """One rank's part of a dataset; determines its rows, their order and their pairs.

    Args:
        dataset: The images at rest.
        config: Seed, batch size, pairs and memory budget.
        workers: The number of ranks that train on the dataset.
        rank: The rank whose part this is.
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
    def total_rows(self) -> int:
        """Rows of all ranks together."""
        return self.dataset.info.splits[TRAIN_SPLIT].rows

    @property
    def steps(self) -> int:
        """Batches per epoch, the same on every rank; the last one may be incomplete."""
        rows = math.ceil(self.total_rows / self.workers) * self.config.epoch_repeats
        return math.ceil(rows / self.local_batch_size)

    @cached_property
    def labelled_ids(self) -> NDArray[np.int64] | None:
        """The ids of the images that keep their label; None if all do."""
        labels = self.config.labels
        if labels.count is None:
            return None
        return draw_labelled_ids(self.dataset, labels.count, labels.seed)

    @property
    def unlabelled_rows(self) -> int:
        """Rows of all ranks together whose label is missing or not used."""
        labelled = self.dataset.info.labelled_rows(TRAIN_SPLIT)
        return self.total_rows - min(self.config.labels.count or labelled, labelled)

    @property
    def uses_labels(self) -> bool:
        """Whether the pairs or the networks depend on labels."""
        return self.config.condition != "none" or self.config.pairs.mode == "labels"

    @cached_property
    def classes(self) -> list[str]:
        """The names of the labels if the config uses them, else empty."""
        return self.dataset.class_names() if self.config.condition != "none" else []

    @cached_property
    def counts(self) -> list[int]:
        """The number of training images of each of the `classes`, of those that keep a label."""
        return self.count_labels() if self.classes else []

    def count_labels(self) -> list[int]:
        """Count the training images of each class, of those that keep their label."""
        if self.labelled_ids is None:
            return self.dataset.class_counts(TRAIN_SPLIT)
        ids, labels = self.dataset.read_labels(TRAIN_SPLIT)
        kept = labels[np.isin(ids, self.labelled_ids)]
        return np.bincount(kept, minlength=len(self.dataset.class_names())).tolist()

    @property
    def gigabytes(self) -> float:
        """Size of the pixels of rank 0, which has the most rows, in GB; the same on every rank."""
        rows = math.ceil(self.total_rows / self.workers)
        return rows * math.prod(self.dataset.info.shape) / 1e9

    @property
    def resident(self) -> bool:
        """Whether the rows are kept on the device; otherwise they are streamed every epoch."""
        return self.gigabytes <= self.config.shards.memory

    @property
    def rank_bounds(self) -> list[tuple[int, int]]:
        """First and end index of each rank's rows in `shuffled_groups`; equal parts to one row."""
        # Rounded up: rank 0 has the most, so its last batch, from which samples are shown, is
        # never empty.
        return list(
            pairwise(-(-self.total_rows * r // self.workers) for r in range(self.workers + 1))
        )

    @property
    def bounds(self) -> tuple[int, int]:
        """First and end index of this rank's rows in `shuffled_groups`."""
        return self.rank_bounds[self.rank]

    def present(self, step: int) -> np.ndarray:
        """Return which rows of each rank's batch at a step of an epoch are no padding, [N, b]."""
        repeats = self.config.epoch_repeats
        rows = np.array([(end - first) * repeats for first, end in self.rank_bounds])
        positions = step * self.local_batch_size + np.arange(self.local_batch_size)
        return positions < rows[:, None]

    def shuffled_groups(self, epoch: int) -> RowGroups:
        """Return all row groups of the dataset in a random order, the same on every rank."""
        groups = self.dataset.row_groups(TRAIN_SPLIT)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(groups))
        return groups.take(order)

    def row_ranges(self, epoch: int) -> list[RowRange]:
        """Return this rank's rows; ranks are disjoint and together cover the dataset.

        A resident partition keeps the rows of epoch 0.
        """
        return self.shuffled_groups(epoch).rows(*self.bounds)

    def read(self, ranges: Sequence[RowRange]) -> RowBatch:
        """Read rows of the dataset, with the labels that are used."""
        return self.select_labels(self.dataset.read(TRAIN_SPLIT, ranges))

    def select_labels(self, rows: RowBatch) -> RowBatch:
        """Replace labels that are not used by UNLABELLED."""
        if self.labelled_ids is None or rows.label is None:
            return rows
        kept = np.isin(rows.id, self.labelled_ids)
        return replace(rows, label=np.where(kept, rows.label, UNLABELLED))

    @property
    def window_rows(self) -> int:
        """Rows of a window, about: `shards.window`, or fewer within WINDOW_BYTES of pixels."""
        return min(self.config.shards.window, WINDOW_BYTES // math.prod(self.dataset.info.shape))

    def windows(self, epoch: int) -> list[list[RowRange]]:
        """Return this rank's rows of a streamed epoch, in windows of about `window_rows`.

        Rows are shuffled and paired within their window.
        """
        first, end = self.bounds
        total, repeats = end - first, self.config.epoch_repeats
        count = max(1, round(total / self.window_rows))
        ends = [first + total * i // count for i in range(count + 1)]
        passes = (self.shuffled_groups(epoch * repeats + k) for k in range(repeats))
        return [groups.rows(a, b) for groups in passes for a, b in pairwise(ends)]


def draw_labelled_ids(dataset: Dataset, count: int, seed: int) -> NDArray[np.int64]:
    """Draw labelled training images, as many of each class as possible.

    A class with fewer images than its part has all of them drawn.

    Args:
        dataset: The images at rest; its rows alone and the seed decide.
        count: Number of images, from the number of classes to that of labelled images.
        seed: Seed of the draw.

    Returns:
        Their ids [count], sorted.
    """
    ids, labels = dataset.read_labels(TRAIN_SPLIT)
    return np.sort(ids[draw_labelled_rows(labels, count, seed)])


def draw_labelled_rows(labels: NDArray[np.int64], count: int, seed: int) -> NDArray[np.int64]:
    """Return `count` indices of labels [n] other than UNLABELLED; see `draw_labelled_ids`."""
    random = np.random.default_rng(seed)
    shuffled = random.permutation(np.flatnonzero(labels != UNLABELLED))
    rows = shuffled[np.argsort(labels[shuffled], kind="stable")]
    classes, first, sizes = np.unique(labels[rows], return_index=True, return_counts=True)
    rank_in_class = np.arange(len(rows)) - first.repeat(sizes)
    tie_break = random.permutation(len(classes)).repeat(sizes)
    return rows[np.lexsort((tie_break, rank_in_class))[:count]]
