"""A rank's batches of pairs, from memory or from a stream. Free of Ray.

Which rows a rank has, in which order and with which negatives, follows from (seed, epoch,
workers, rank) alone, whatever order the images arrived in.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cl_ray.data.dataset import RowBatch
from cl_ray.data.pairs import PairSampler
from cl_ray.data.partition import TRAIN_SPLIT, Partition
from cl_ray.gan import PairBatch
from cl_ray.rng import seeded_generator


def partition_generator(partition: Partition, epoch: int, part: int) -> torch.Generator:
    """The source of chance for one part (a step, or a window) of a rank's epoch."""
    return seeded_generator(partition.config.seed, epoch, partition.workers, partition.rank, part)


def build_pair_sampler(partition: Partition, images: Tensor, labels: Tensor | None) -> PairSampler:
    """The sampler of pairs out of one pool of the dataset's images."""
    pairs = partition.config.pairs
    distance = partition.dataset.distance_quantile(TRAIN_SPLIT, pairs.quantile)
    return PairSampler(pairs, images, labels, distance)


def sample_window_pairs(
    partition: Partition, rows: RowBatch, epoch: int, window: int
) -> dict[str, np.ndarray]:
    """The rows of a window, shuffled, each with its negative and, with labels, its partner.

    Returns:
        `id` [n], `positive`, `negative` and, in the mode `labels`, `partner` [n, H, W, C]; where
        labels are used, `labels` [n, 2], of positive and negative.
    """
    images, labels = sort_by_id(rows)
    random = partition_generator(partition, epoch, window)
    positives = torch.randperm(len(images), generator=random)
    partners, negatives = build_pair_sampler(partition, images, labels).draw(positives, random)
    columns = {"positive": positives, "negative": negatives}
    if partition.config.pairs.mode == "labels":
        columns["partner"] = partners
    paired = {name: images[chosen].numpy() for name, chosen in columns.items()}
    if partition.classes:
        assert labels is not None, "labels are used only of data that has them"
        paired["labels"] = torch.stack([labels[positives], labels[negatives]], 1).numpy()
    return {"id": np.sort(rows.id)[positives.numpy()], **paired}


class PairLoader(Protocol):
    """What a run takes its batches from."""

    partition: Partition

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The epoch's batches from step `start` on; `partition.steps` in all."""
        ...


class InMemoryLoader:
    """A share kept on the device as uint8, its pairs redrawn there each epoch.

    Args:
        partition: Whose rows these are.
        rows: The rows of `partition.pieces(0)`, in any order.
        device: Where to keep them.
    """

    def __init__(self, partition: Partition, rows: RowBatch, device: torch.device | str = "cpu"):
        self.partition = partition
        images, labels = sort_by_id(rows)
        self.images = images.to(device)
        self.labels = None if labels is None else labels.to(device)
        self.sampler = build_pair_sampler(partition, self.images, self.labels)

    @classmethod
    def read(cls, partition: Partition, device: torch.device | str = "cpu") -> "InMemoryLoader":
        """Read the share in this process, without Ray."""
        return cls(partition, partition.dataset.read(TRAIN_SPLIT, partition.pieces(0)), device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The epoch's batches from step `start` on."""
        local, images = self.partition.local_batch_size, self.images
        labels = self.labels if self.partition.classes else None
        order = torch.randperm(
            len(images), generator=partition_generator(self.partition, epoch, 0)
        ).to(images.device)
        for step in range(start, self.partition.steps):
            places = torch.arange(step * local, (step + 1) * local, device=images.device)
            present = places < len(order)
            rows = order[places % len(order)]  # filled up from the front; not present
            partners, negatives = self.sampler.draw(
                rows, partition_generator(self.partition, epoch, step + 1)
            )
            yield PairBatch(
                images[rows],
                images[partners],
                images[negatives],
                present,
                None if labels is None else torch.stack([labels[rows], labels[negatives]], 1),
            )


class WindowReader(Protocol):
    """Delivers the paired windows of an epoch, in order, from window `first` on."""

    def __call__(self, epoch: int, first: int) -> Iterator[dict[str, np.ndarray]]:
        """Columns of one window after another."""
        ...


class StreamingLoader:
    """A share too large to keep: windows of paired rows, cut into batches as they come.

    Args:
        partition: Whose rows these are.
        deliver: What reads and pairs the windows, in the order of `partition.windows(epoch)`.
        device: Where batches go.
    """

    def __init__(
        self, partition: Partition, deliver: WindowReader, device: torch.device | str = "cpu"
    ):
        self.partition, self.deliver, self.device = partition, deliver, device

    @classmethod
    def read(cls, partition: Partition, device: torch.device | str = "cpu") -> "StreamingLoader":
        """Read and pair the windows in this process, without Ray."""

        def deliver(epoch: int, first: int) -> Iterator[dict[str, np.ndarray]]:
            for window, pieces in enumerate(partition.windows(epoch)[first:], first):
                yield sample_window_pairs(
                    partition, partition.dataset.read(TRAIN_SPLIT, pieces), epoch, window
                )

        return cls(partition, deliver, device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """The epoch's batches from step `start` on; windows before it are not read."""
        skip, first = start * self.partition.local_batch_size, 0
        for pieces in self.partition.windows(epoch):
            rows = sum(piece.stop - piece.start for piece in pieces)
            if skip < rows:
                break
            skip, first = skip - rows, first + 1
        columns = rebatch(self.deliver(epoch, first), skip, self.partition.local_batch_size)
        for _ in range(start, self.partition.steps):
            yield self._batch(next(columns, None))

    def _batch(self, columns: dict[str, np.ndarray] | None) -> PairBatch:
        local, shape = self.partition.local_batch_size, self.partition.dataset.info.shape
        columns = columns or {"positive": np.zeros((0, *shape), np.uint8)}
        rows = len(columns["positive"])

        def filled(name: str) -> Tensor:
            images = np.zeros((local, *shape), np.uint8)
            images[:rows] = columns.get(name, columns["positive"])
            return torch.from_numpy(images).to(self.device, non_blocking=True)

        present = torch.arange(local, device=self.device) < rows
        labels = None
        if self.partition.classes:
            classes = np.zeros((local, 2), np.int64)
            classes[:rows] = columns.get("labels", classes[:0])
            labels = torch.from_numpy(classes).to(self.device, non_blocking=True)
        return PairBatch(filled("positive"), filled("partner"), filled("negative"), present, labels)


def sort_by_id(rows: RowBatch) -> tuple[Tensor, Tensor | None]:
    """Images and labels as tensors, sorted by id, so that the order of arrival is forgotten."""
    order = np.argsort(rows.id, kind="stable")
    labels = None if rows.label is None else torch.from_numpy(rows.label[order])
    return torch.from_numpy(rows.image[order]), labels


def rebatch(
    windows: Iterator[dict[str, np.ndarray]], skip: int, size: int
) -> Iterator[dict[str, np.ndarray]]:
    """Rows of all windows laid one after another, `skip` left out, `size` at a time."""
    left: dict[str, np.ndarray] = {}
    for window in windows:
        rest = {name: column[skip:] for name, column in window.items()}
        skip = 0
        left = {n: np.concatenate([left[n], c]) for n, c in rest.items()} if left else rest
        while len(left["positive"]) >= size:
            yield {name: column[:size] for name, column in left.items()}
            left = {name: column[size:] for name, column in left.items()}
    if left and len(left["positive"]):
        yield left
