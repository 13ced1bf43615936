"""A rank's share of the images, and its batches of pairs. Free of Ray.

Which rows a rank has, in which order and with which negatives, follows from (seed, epoch,
workers, rank) alone, whatever order the images arrived in.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cl_ray.adversary import Batch, generator_of
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset, Piece, Rows
from cl_ray.data.pairs import PairSampler

SPLIT = "train"


@dataclass(frozen=True)
class Share:
    """Which part of a dataset is whose: all that a rank's rows, order and pairs depend on.

    Args:
        dataset: The images at rest.
        config: The config tree; of it seed, batch size, pairs and shards.
        workers: How many ranks share the dataset.
        rank: Whose share this is.
    """

    dataset: Dataset
    config: Config
    workers: int = 1
    rank: int = 0

    @property
    def local(self) -> int:
        """Pairs in one of this rank's batches."""
        return self.config.batch_size // self.workers

    @property
    def steps(self) -> int:
        """Batches an epoch, alike on every rank; the last one may be short of rows."""
        rows = self.dataset.info.splits[SPLIT].rows
        return math.ceil(math.ceil(rows / self.workers) / self.local)

    @property
    def gigabytes(self) -> float:
        """Size of the largest rank's pixels."""
        rows = math.ceil(self.dataset.info.splits[SPLIT].rows / self.workers)
        return rows * math.prod(self.dataset.info.shape) / 1e9

    @property
    def resident(self) -> bool:
        """Whether the share stays on the device; otherwise it streams."""
        return self.gigabytes <= self.config.shards.memory

    def random(self, epoch: int, part: int) -> torch.Generator:
        """The source of chance for one part (a step, or a window) of an epoch."""
        return generator_of(self.config.seed, epoch, self.workers, self.rank, part)

    def pieces(self, epoch: int) -> list[Piece]:
        """This rank's rows: an equal run, to one row, of all row groups in a random order.

        A resident share is that of epoch 0 for good. The order is alike on every rank, so the
        shares are disjoint and together the whole.
        """
        groups = self.dataset.pieces(SPLIT)
        order = np.random.default_rng([self.config.seed, epoch]).permutation(len(groups))
        total = sum(piece.stop - piece.start for piece in groups)
        first, end = (total * r // self.workers for r in (self.rank, self.rank + 1))
        return run_of_rows([groups[i] for i in order], first, end)

    def windows(self, epoch: int) -> list[list[Piece]]:
        """This rank's rows of a streamed epoch, in parts that are shuffled and paired together."""
        pieces = self.pieces(epoch)
        total = sum(piece.stop - piece.start for piece in pieces)
        count = max(1, round(total / self.config.shards.window))
        ends = [total * i // count for i in range(count + 1)]
        return [run_of_rows(pieces, a, b) for a, b in pairwise(ends)]

    def sampler(self, images: Tensor, labels: Tensor | None) -> PairSampler:
        """The sampler of pairs out of one pool of this dataset's images."""
        pairs = self.config.pairs
        distance = self.dataset.distance_quantile(SPLIT, pairs.quantile)
        return PairSampler(pairs, images, labels, distance)

    def pair_window(self, rows: Rows, epoch: int, window: int) -> dict[str, np.ndarray]:
        """The rows of a window, shuffled, each with its negative and, with labels, its partner.

        Returns:
            `id` [n], `positive`, `negative` and, in the mode `labels`, `partner` [n, H, W, C].
        """
        images, labels = in_order_of_id(rows)
        random = self.random(epoch, window)
        positives = torch.randperm(len(images), generator=random)
        partners, negatives = self.sampler(images, labels).draw(positives, random)
        columns = {"positive": positives, "negative": negatives}
        if self.config.pairs.mode == "labels":
            columns["partner"] = partners
        paired = {name: images[chosen].numpy() for name, chosen in columns.items()}
        return {"id": np.sort(rows.id)[positives.numpy()], **paired}


class Shard(Protocol):
    """What a run takes its batches from."""

    share: Share

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from step `start` on; `share.steps` in all."""
        ...


class ResidentShard:
    """A share kept on the device as uint8, its pairs redrawn there each epoch.

    Args:
        share: Whose rows these are.
        rows: The rows of `share.pieces(0)`, in any order.
        device: Where to keep them.
    """

    def __init__(self, share: Share, rows: Rows, device: torch.device | str = "cpu"):
        self.share = share
        images, labels = in_order_of_id(rows)
        self.images = images.to(device)
        self.sampler = share.sampler(self.images, None if labels is None else labels.to(device))

    @classmethod
    def read(cls, share: Share, device: torch.device | str = "cpu") -> "ResidentShard":
        """Read the share in this process, without Ray."""
        return cls(share, share.dataset.read(SPLIT, share.pieces(0)), device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from step `start` on."""
        local, images = self.share.local, self.images
        order = torch.randperm(len(images), generator=self.share.random(epoch, 0)).to(images.device)
        for step in range(start, self.share.steps):
            rows = order[step * local : (step + 1) * local]
            present = torch.arange(local, device=images.device) < len(rows)
            rows = torch.cat([rows, order[: local - len(rows)]])  # fill up; not present
            partners, negatives = self.sampler.draw(rows, self.share.random(epoch, step + 1))
            yield Batch(images[rows], images[partners], images[negatives], present)


class Windows(Protocol):
    """Delivers the paired windows of an epoch, in order, from window `first` on."""

    def __call__(self, epoch: int, first: int) -> Iterator[dict[str, np.ndarray]]:
        """Columns of one window after another."""
        ...


class StreamingShard:
    """A share too large to keep: windows of paired rows, cut into batches as they come.

    Args:
        share: Whose rows these are.
        deliver: What reads and pairs the windows, in the order of `share.windows(epoch)`.
        device: Where batches go.
    """

    def __init__(self, share: Share, deliver: Windows, device: torch.device | str = "cpu"):
        self.share, self.deliver, self.device = share, deliver, device

    @classmethod
    def read(cls, share: Share, device: torch.device | str = "cpu") -> "StreamingShard":
        """Read and pair the windows in this process, without Ray."""

        def deliver(epoch: int, first: int) -> Iterator[dict[str, np.ndarray]]:
            for window, pieces in enumerate(share.windows(epoch)[first:], first):
                yield share.pair_window(share.dataset.read(SPLIT, pieces), epoch, window)

        return cls(share, deliver, device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from step `start` on; windows before it are not read."""
        skip, first = start * self.share.local, 0
        for pieces in self.share.windows(epoch):
            rows = sum(piece.stop - piece.start for piece in pieces)
            if skip < rows:
                break
            skip, first = skip - rows, first + 1
        columns = cut(self.deliver(epoch, first), skip, self.share.local)
        for _ in range(start, self.share.steps):
            yield self._batch(next(columns, None))

    def _batch(self, columns: dict[str, np.ndarray] | None) -> Batch:
        local, shape = self.share.local, self.share.dataset.info.shape
        columns = columns or {"positive": np.zeros((0, *shape), np.uint8)}
        rows = len(columns["positive"])

        def filled(name: str) -> Tensor:
            images = np.zeros((local, *shape), np.uint8)
            images[:rows] = columns.get(name, columns["positive"])
            return torch.from_numpy(images).to(self.device, non_blocking=True)

        present = torch.arange(local, device=self.device) < rows
        return Batch(filled("positive"), filled("partner"), filled("negative"), present)


def in_order_of_id(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Images and labels as tensors, sorted by id, so that the order of arrival is forgotten."""
    order = np.argsort(rows.id, kind="stable")
    labels = None if rows.label is None else torch.from_numpy(rows.label[order])
    return torch.from_numpy(rows.image[order]), labels


def run_of_rows(pieces: Sequence[Piece], first: int, end: int) -> list[Piece]:
    """The rows [first, end) of pieces laid one after another."""
    chosen, at = [], 0
    for piece in pieces:
        rows = piece.stop - piece.start
        start, stop = max(first - at, 0), min(end - at, rows)
        if start < stop:
            chosen.append(Piece(piece.shard, piece.group, piece.start + start, piece.start + stop))
        at += rows
    return chosen


def cut(
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
