"""What is made: images of noise, variants of images, embeddings. Free of ray.

The results are numbered from 0, and any stretch of them is a pure function of the request, so
they can be cut into parts that are made in any order, on any machine, and made again.
"""

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cl_ray.data.dataset import Dataset, RowBatch, RowRange
from cl_ray.errors import UserError, redact_credentials

if TYPE_CHECKING:
    from cl_ray.model import TrainedModel

PART_BYTES = 2**25
"""Most bytes of pixels or features in a part: what an actor holds does not grow with the count."""
SMALL_PART = 4096
"""Images in a part of a small request, enough that a part's own cost is no matter."""
PARTS = 1000
"""A larger request has about so many parts, until they reach PART_BYTES."""


class Work(Protocol):
    """Something that is made part by part; small and picklable."""

    @property
    def total(self) -> int:
        """Results in all."""
        ...

    @property
    def dataset(self) -> Dataset | None:
        """Whose images are read, if any are."""
        ...

    @property
    def grain(self) -> int:
        """Parts of a multiple of this many read the least."""
        ...

    def width(self, run: "TrainedModel") -> int:
        """Bytes of one result."""
        ...

    def make(self, run: "TrainedModel", start: int, stop: int) -> pa.Table:
        """Results [start, stop), with their columns."""
        ...

    def record(self) -> dict[str, Any]:
        """What decides the results, besides the run, in plain values."""
        ...


@dataclass(frozen=True)
class FromNoise:
    """`total` images that a seed gives: columns id, label if the run knows classes, and image."""

    total: int
    seed: int
    truncation: float = 1.0
    label: str | None = None
    dataset: None = None
    grain: int = 1

    def width(self, run: "TrainedModel") -> int:
        """Bytes of an image.

        Raises:
            UserError: The run's generator knows no truncation, or no such class; or none of its
                training images was of that class.
        """
        run.check_truncation(self.truncation)
        if self.label is not None:
            run.class_number(self.label)
        return int(np.prod(run.shape))

    def make(self, run: "TrainedModel", start: int, stop: int) -> pa.Table:
        """Images number `start` to `stop`."""
        stretch = stop - start, self.seed, start
        images = run.generate(*stretch, self.truncation, self.label)
        label = run.sample_labels(*stretch, self.label)
        return table(np.arange(start, stop), label, image=tensors(images))

    def record(self) -> dict[str, Any]:
        """Plain values."""
        asked = {"verb": "generate", "count": self.total, "seed": self.seed}
        asked |= {"truncation": self.truncation} if self.truncation < 1 else {}
        return asked | ({"class": self.label} if self.label is not None else {})


@dataclass(frozen=True)
class Around:
    """`copies` variants of every image of a split: columns id, label if any, source and image.

    A variant is the decoded latent vector of its source, of mean square 1, after unit noise times
    `distance` was added: 0 gives the reconstruction, and what is far off is noise's own image.
    The id is unique; `source` is the id of the image that it is a variant of.
    """

    dataset: Dataset
    split: str
    copies: int
    distance: float
    seed: int

    @property
    def total(self) -> int:
        """Variants in all."""
        return self.copies * self.dataset.info.splits[self.split].rows

    @property
    def grain(self) -> int:
        """Variants of a row group."""
        return self.copies * self.dataset.info.row_group

    def width(self, run: "TrainedModel") -> int:
        """Bytes of an image.

        Raises:
            UserError: The run was trained with labels, and the images have none or others.
        """
        run.check_classes(self.dataset)
        if not self.dataset.info.labelled and run.config.condition == "projection":
            raise UserError(
                f"{self.dataset.location} has no labels, and this run makes images of a class "
                "(condition projection): give labelled data."
            )
        return int(np.prod(run.shape))

    def make(self, run: "TrainedModel", start: int, stop: int) -> pa.Table:
        """Variants number `start` to `stop`; each image is read and encoded once."""
        number = np.arange(start, stop)
        row, copy = number // self.copies, number % self.copies
        rows = read(self.dataset, self.split, int(row[0]), int(row[-1]) + 1)
        picked = row - row[0]
        latents = run.encode(rows.image)[picked]
        moved = latents + self.distance * run.noise(len(latents), self.seed, start)
        source = rows.id[picked]
        label = None if rows.label is None else rows.label[picked]
        kinds = None
        if run.classes:
            kinds = run.classify(rows.image)[picked] if label is None else label
        images = tensors(run.decode(moved, labels=kinds))
        return table(source * self.copies + copy, label, source=pa.array(source), image=images)

    def record(self) -> dict[str, Any]:
        """Plain values."""
        wanted = {"copies": self.copies, "distance": self.distance, "seed": self.seed}
        return {"verb": "generate", **read_from(self.dataset, self.split), **wanted}


@dataclass(frozen=True)
class Embed:
    """D's representation of every image of a split: columns id, label if any, and embedding."""

    dataset: Dataset
    split: str

    @property
    def total(self) -> int:
        """Images in all."""
        return self.dataset.info.splits[self.split].rows

    @property
    def grain(self) -> int:
        """Images of a row group."""
        return self.dataset.info.row_group

    def width(self, run: "TrainedModel") -> int:
        """Bytes of an embedding."""
        return 4 * run.discriminator.represented

    def make(self, run: "TrainedModel", start: int, stop: int) -> pa.Table:
        """Embeddings of rows `start` to `stop`, float32 of a fixed size."""
        rows = read(self.dataset, self.split, start, stop)
        values = run.embed(rows.image)
        number = pa.field("element", pa.float32(), nullable=False)
        kind = pa.list_(number, values.shape[1])
        column = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=kind)
        return table(rows.id, rows.label, embedding=column)

    def record(self) -> dict[str, Any]:
        """Plain values."""
        return {"verb": "embed", **read_from(self.dataset, self.split)}


def note(work: Work, run: "TrainedModel") -> str:
    """What a user should know of the results before they are made; empty for nothing."""
    from cl_ray.model import EVENLY, UNPLACED

    if not isinstance(work, FromNoise):
        return ""
    evenly = work.label is None and run.classes and not run.counts
    unplaced = run.prior is None and run.config.generator.prior
    return " ".join([EVENLY] * bool(evenly) + [UNPLACED] * bool(unplaced))


def part_size(work: Work, run: "TrainedModel") -> int:
    """Results in a part."""
    size = max(SMALL_PART, work.total // PARTS)
    size = max(1, min(size, PART_BYTES // work.width(run)))
    return size // work.grain * work.grain or size


def read(dataset: Dataset, split: str, start: int, stop: int) -> RowBatch:
    """Rows [start, stop) of a split, in the order in which they lie there."""
    size = dataset.info.row_group
    pieces = []
    before = 0  # rows of the shards passed
    for number, shard in enumerate(dataset.info.splits[split].shards):
        at, end = max(start - before, 0), min(stop - before, shard.rows)
        while at < end:
            group = at // size
            until = min((group + 1) * size, end)
            pieces.append(RowRange(number, group, at - group * size, until - group * size))
            at = until
        before += shard.rows
    return dataset.read(split, pieces)


def read_from(dataset: Dataset, split: str) -> dict[str, str]:
    """A split as a record names it: with a digest, for other data may come to lie there."""
    shards = "".join(shard.sha256 for shard in dataset.info.splits[split].shards)
    digest = hashlib.sha256(shards.encode()).hexdigest()
    return {"data": redact_credentials(dataset.location), "split": split, "data digest": digest}


def tensors(images: NDArray[np.uint8]) -> pa.Array:
    """[n, H, W, C] as a column of fixed-shape tensors."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))


def table(ids: NDArray[np.int64], label: NDArray[np.int64] | None, **columns: pa.Array) -> pa.Table:
    """Columns, id and label first."""
    labels = {} if label is None else {"label": pa.array(label)}
    return pa.table({"id": pa.array(ids), **labels, **columns})
