"""A rank's batches of pairs, from memory or from a stream. Free of Ray.

Which rows a rank has, in which order and with which negatives, follows from (seed, epoch,
workers, rank) alone, whatever order the images arrived in.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from cl_ray.adversary import Batch
from cl_ray.chance import generator_of
from cl_ray.data.dataset import Rows
from cl_ray.data.pairs import PairSampler
from cl_ray.data.share import SPLIT, Share


def chance(share: Share, epoch: int, part: int) -> torch.Generator:
    """The source of chance for one part (a step, or a window) of a rank's epoch."""
    return generator_of(share.config.seed, epoch, share.workers, share.rank, part)


def sampler(share: Share, images: Tensor, labels: Tensor | None) -> PairSampler:
    """The sampler of pairs out of one pool of the dataset's images."""
    pairs = share.config.pairs
    distance = share.dataset.distance_quantile(SPLIT, pairs.quantile)
    return PairSampler(pairs, images, labels, distance)


def pair_window(share: Share, rows: Rows, epoch: int, window: int) -> dict[str, np.ndarray]:
    """The rows of a window, shuffled, each with its negative and, with labels, its partner.

    Returns:
        `id` [n], `positive`, `negative` and, in the mode `labels`, `partner` [n, H, W, C]; where
        labels are used, `labels` [n, 2], of positive and negative.
    """
    images, labels = in_order_of_id(rows)
    random = chance(share, epoch, window)
    positives = torch.randperm(len(images), generator=random)
    partners, negatives = sampler(share, images, labels).draw(positives, random)
    columns = {"positive": positives, "negative": negatives}
    if share.config.pairs.mode == "labels":
        columns["partner"] = partners
    paired = {name: images[chosen].numpy() for name, chosen in columns.items()}
    if share.classes:
        assert labels is not None, "labels are used only of data that has them"
        paired["labels"] = torch.stack([labels[positives], labels[negatives]], 1).numpy()
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
        self.labels = None if labels is None else labels.to(device)
        self.sampler = sampler(share, self.images, self.labels)

    @classmethod
    def read(cls, share: Share, device: torch.device | str = "cpu") -> "ResidentShard":
        """Read the share in this process, without Ray."""
        return cls(share, share.dataset.read(SPLIT, share.pieces(0)), device)

    def batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The epoch's batches from step `start` on."""
        local, images = self.share.local, self.images
        labels = self.labels if self.share.classes else None
        order = torch.randperm(len(images), generator=chance(self.share, epoch, 0)).to(
            images.device
        )
        for step in range(start, self.share.steps):
            places = torch.arange(step * local, (step + 1) * local, device=images.device)
            present = places < len(order)
            rows = order[places % len(order)]  # filled up from the front; not present
            partners, negatives = self.sampler.draw(rows, chance(self.share, epoch, step + 1))
            yield Batch(
                images[rows],
                images[partners],
                images[negatives],
                present,
                None if labels is None else torch.stack([labels[rows], labels[negatives]], 1),
            )


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
                yield pair_window(share, share.dataset.read(SPLIT, pieces), epoch, window)

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
        labels = None
        if self.share.classes:
            classes = np.zeros((local, 2), np.int64)
            classes[:rows] = columns.get("labels", classes[:0])
            labels = torch.from_numpy(classes).to(self.device, non_blocking=True)
        return Batch(filled("positive"), filled("partner"), filled("negative"), present, labels)


def in_order_of_id(rows: Rows) -> tuple[Tensor, Tensor | None]:
    """Images and labels as tensors, sorted by id, so that the order of arrival is forgotten."""
    order = np.argsort(rows.id, kind="stable")
    labels = None if rows.label is None else torch.from_numpy(rows.label[order])
    return torch.from_numpy(rows.image[order]), labels


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
