"""Loaders of a rank's batches of pairs, from memory or from a stream; free of Ray.

The order of rows and their negatives depend on (seed, epoch, workers, rank) only, not on the order
in which rows arrive.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from cl_ray.batch import PairBatch
from cl_ray.data.dataset import UNLABELLED, RowBatch, distance_stride
from cl_ray.data.pairs import PairSampler
from cl_ray.data.partition import TRAIN_SPLIT, Partition
from cl_ray.rng import seeded_generator

Columns = dict[str, np.ndarray]
"""Rows that are paired, as arrays by name, see `sample_window_pairs`."""
PAIR_IMAGES = ("positive", "partner", "negative")
WindowReader = Callable[[int, int], Iterator[Columns]]
"""Yields the paired windows of an epoch in order, given the epoch and the first window."""


class InMemoryLoader:
    """Keeps a partition on the device as uint8 and resamples its pairs there every epoch.

    Args:
        partition: The rank's part of the dataset.
        rows: The rows of `partition.row_ranges(0)`, in any order.
        device: Where to keep them.
    """

    def __init__(self, partition: Partition, rows: RowBatch, device: torch.device | str = "cpu"):
        self.partition = partition
        rows = rows.sorted_by_id()
        self.images = torch.from_numpy(rows.image).to(device)
        self.labels = None if rows.label is None else torch.from_numpy(rows.label).to(device)
        self.sampler = _pair_sampler(partition, self.images, self.labels)

    @classmethod
    def read(cls, partition: Partition, device: torch.device | str = "cpu") -> "InMemoryLoader":
        """Read the partition in this process, without Ray."""
        return cls(partition, partition.read(partition.row_ranges(0)), device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """Yield the batches of an epoch from step `start` on; `partition.steps` in all."""
        size, images = self.partition.local_batch_size, self.images
        labels = self.labels if self.partition.classes else None
        random = _generator(self.partition, epoch, 0)
        repeats = range(self.partition.config.epoch_repeats)
        order = torch.cat([torch.randperm(len(images), generator=random) for _ in repeats])
        order = order.to(images.device)
        for step in range(start, self.partition.steps):
            positions = torch.arange(step * size, (step + 1) * size, device=images.device)
            rows = order[positions % len(order)]  # padded by the first rows, which are not present
            present = torch.from_numpy(self.partition.present(step))
            present = present.to(images.device, non_blocking=True)
            generator = _generator(self.partition, epoch, step + 1)
            rows = _oversample_labelled(rows, self.labels, self.partition, generator)
            partners, negatives = self.sampler.sample(rows, generator)
            batch = PairBatch(images[rows], images[partners], images[negatives], present)
            if labels is not None:
                classes = torch.stack([labels[rows], labels[negatives]], 1)
                batch = _with_labels(batch, classes, self.partition)
            yield batch


class StreamingLoader:
    """Streams a partition that exceeds the memory budget: cuts windows of paired rows to batches.

    Args:
        partition: The rank's part of the dataset.
        read_windows: Reads and pairs the windows of `partition.windows(epoch)`.
        device: The device of the batches.
    """

    def __init__(
        self, partition: Partition, read_windows: WindowReader, device: torch.device | str = "cpu"
    ):
        self.partition, self.read_windows, self.device = partition, read_windows, device

    @classmethod
    def read(cls, partition: Partition, device: torch.device | str = "cpu") -> "StreamingLoader":
        """Read and pair the windows in this process, without Ray."""

        def read_windows(epoch: int, first: int) -> Iterator[Columns]:
            for window, ranges in enumerate(partition.windows(epoch)[first:], first):
                yield sample_window_pairs(partition, partition.read(ranges), epoch, window)

        return cls(partition, read_windows, device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[PairBatch]:
        """Yield the batches of an epoch from step `start` on; windows before it are not read."""
        size = self.partition.local_batch_size
        skip, first = start * size, 0
        for ranges in self.partition.windows(epoch):
            rows = sum(part.rows for part in ranges)
            if skip < rows:
                break
            skip, first = skip - rows, first + 1
        parts = _rebatch(self.read_windows(epoch, first), skip, size)
        for step in range(start, self.partition.steps):
            yield self._pad(next(parts, None), step)

    def _pad(self, columns: Columns | None, step: int) -> PairBatch:
        """Pad the rows of a step to a batch; the last step may have none."""
        size, shape = self.partition.local_batch_size, self.partition.dataset.info.shape
        columns = columns or {"positive": np.zeros((0, *shape), np.uint8)}

        def to_device(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            if torch.device(self.device).type == "cuda":  # else the copy waits for the GPU
                tensor = tensor.pin_memory()
            return tensor.to(self.device, non_blocking=True)

        def padded(column: np.ndarray) -> Tensor:
            if len(column) < size:
                rest = np.zeros((size - len(column), *column.shape[1:]), column.dtype)
                column = np.concatenate([column, rest])
            return to_device(column)

        images = {name: padded(columns[name]) for name in PAIR_IMAGES if name in columns}
        positive = images["positive"]
        partner, negative = (images.get(name, positive) for name in PAIR_IMAGES[1:])
        present = to_device(self.partition.present(step))
        batch = PairBatch(positive, partner, negative, present)
        if not self.partition.classes:
            return batch
        labels = padded(columns.get("labels", np.zeros((0, 2), np.int64)))
        return _with_labels(batch, labels, self.partition)


PairLoader = InMemoryLoader | StreamingLoader
"""Yields a rank's batches, epoch by epoch."""


def sample_window_pairs(partition: Partition, rows: RowBatch, epoch: int, window: int) -> Columns:
    """Shuffle the rows of a window and sample a negative and, with labels, a partner for each.

    Returns:
        `image` [n, H, W, C], those of the rows; of each pair the indices among them of `positive`,
        `negative` and, in the mode `labels`, `partner`, [n], and the `id` of the positive; if
        labels are used, `labels` [n, 2], of positive and negative. Pairs do not depend on the
        order of the rows.
    """
    order, stride = np.argsort(rows.id, kind="stable"), distance_stride(rows.image.shape[1])
    thumbnails = torch.from_numpy(rows.image[:, ::stride, ::stride][order])
    labels = None if rows.label is None else torch.from_numpy(rows.label[order])
    generator = _generator(partition, epoch, window)
    positives = torch.randperm(len(order), generator=generator)
    positives = _oversample_labelled(positives, labels, partition, generator)
    partners, negatives = _pair_sampler(partition, thumbnails, labels).sample(positives, generator)
    indices = {"positive": positives, "negative": negatives}
    if partition.config.pairs.mode == "labels":
        indices["partner"] = partners
    columns = {name: order[chosen.numpy()] for name, chosen in indices.items()}
    columns |= {"id": rows.id[columns["positive"]], "image": rows.image}
    if partition.classes:
        assert labels is not None, "labels are used only of data that has them"
        columns["labels"] = torch.stack([labels[positives], labels[negatives]], 1).numpy()
    return columns


def _with_labels(batch: PairBatch, labels: Tensor, partition: Partition) -> PairBatch:
    """Add labels [b, 2], and which of them are known if some images have none."""
    labelled = labels != UNLABELLED if partition.unlabelled_rows else None
    return batch._replace(labels=labels, labelled=labelled)


def _oversample_labelled(
    rows: Tensor, labels: Tensor | None, partition: Partition, generator: torch.Generator
) -> Tensor:
    """Replace `labels.batch_fraction` of the rows by labelled ones, where fewer are labelled.

    The replaced rows are spread evenly, so that all batches that are cut from them have some.

    Args:
        rows: Rows [n] of the pool.
        labels: Labels of the pool; None if the data have none.
        partition: Says whether labels are used, and the fraction.
        generator: A CPU generator.
    """
    fraction = partition.config.labels.batch_fraction
    if labels is None or not partition.uses_labels or not partition.unlabelled_rows:
        return rows
    labelled = (labels != UNLABELLED).nonzero().squeeze(1)
    count = int(fraction * len(rows))
    if (rest := fraction * len(rows) - count) and torch.rand((), generator=generator) < rest:
        count += 1  # the small batches of many workers have the fraction on average
    if not count or not 0 < len(labelled) < fraction * len(labels):
        return rows
    drawn = [
        torch.randperm(len(labelled), generator=generator) for _ in range(0, count, len(labelled))
    ]
    places = torch.arange(count, device=rows.device) * len(rows) // count
    chosen = torch.cat(drawn)[:count].to(rows.device)
    return rows.index_copy(0, places, labelled[chosen])


def _generator(partition: Partition, epoch: int, part: int) -> torch.Generator:
    """Create the random generator of one part (a step or a window) of a rank's epoch."""
    return seeded_generator(partition.config.seed, epoch, partition.workers, partition.rank, part)


def _pair_sampler(partition: Partition, images: Tensor, labels: Tensor | None) -> PairSampler:
    """Build the sampler of pairs from one pool of the dataset's images."""
    pairs = partition.config.pairs
    distance = partition.dataset.distance_quantile(TRAIN_SPLIT, pairs.quantile)
    return PairSampler(pairs, images, labels, distance)


def _rebatch(windows: Iterator[Columns], skip: int, size: int) -> Iterator[Columns]:
    """Yield the images of the pairs of windows, `size` pairs at a time, without the first `skip`.

    Yields:
        `positive`, `negative` and, in the mode `labels`, `partner` [size, H, W, C], and `labels`
        if they are used; the last ones may be fewer.
    """
    batch: Columns = {}
    for window in windows:
        images = window["image"]
        first, skip = skip, 0
        while first < len(images):
            rows = slice(first, first + size - (len(batch["positive"]) if batch else 0))
            part = {n: images[window[n][rows]] for n in PAIR_IMAGES if n in window}
            if "labels" in window:
                part["labels"] = window["labels"][rows]
            batch = {n: np.concatenate([batch[n], c]) for n, c in part.items()} if batch else part
            first = rows.stop
            if len(batch["positive"]) == size:
                yield batch
                batch = {}
    if batch:
        yield batch
