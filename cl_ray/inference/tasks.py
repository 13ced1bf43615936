"""What `generate`, `embed` and `score` compute, in parts. Free of ray.

Rows are numbered from 0, and any range of them is a pure function of the request. So they can be
computed in parts, in any order, on any machine, and again after a crash.
"""

import hashlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from cl_ray.data.dataset import UNLABELLED, Dataset, RowBatch
from cl_ray.data.partition import TRAIN_SPLIT
from cl_ray.errors import UserError

if TYPE_CHECKING:
    from cl_ray.model import TrainedModel

MAX_PART_BYTES = 2**25
"""Limit of the pixels or features in a part, so that an actor's memory does not grow with the
request."""
MIN_PART_ROWS = 4096
"""Rows in a part of a small request, enough to make the fixed cost of a part negligible."""
TARGET_PARTS = 1000
"""About how many parts a larger request has, until they reach MAX_PART_BYTES."""


class InferenceTask(ABC):
    """A computation whose rows can be cut into parts; small and picklable.

    Attributes:
        noun: What the rows are called in messages.
        dataset: The dataset whose images are read, if any.
    """

    noun = "images"
    dataset: Dataset | None

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """Rows of the whole result."""

    @property
    def alignment(self) -> int:
        """Parts whose size is a multiple of this read whole row groups."""
        return 1

    def check(self, model: "TrainedModel") -> None:  # noqa: B027  # most models can do it
        """Check that the model can do it, else a UserError."""

    def note(self, model: "TrainedModel") -> str:
        """Return what a user should know beforehand; empty for nothing."""
        return ""

    def bytes_per_row(self, model: "TrainedModel") -> int:
        """Return the bytes of a row's image or embedding."""
        return int(np.prod(model.shape))

    @abstractmethod
    def compute(self, model: "TrainedModel", start: int, stop: int) -> pa.Table:
        """Compute rows [start, stop), with all their columns."""

    def describe(self) -> dict[str, Any]:
        """Return all that decides the result, besides the model, as plain values.

        A dataset is described by its content too: other data may be written to its place later.
        """
        request = {"task": type(self).__name__, **vars(self)}
        if self.dataset is not None:
            shards = "".join(x.sha256 for x in self.dataset.info.splits[request["split"]].shards)
            request["dataset"] = self.dataset.location
            request["data digest"] = hashlib.sha256(shards.encode()).hexdigest()
        return {name: value for name, value in request.items() if value is not None}

    def part_size(self, model: "TrainedModel") -> int:
        """Return the rows of a part: whole row groups, if one fits into MAX_PART_BYTES."""
        size = max(MIN_PART_ROWS, self.num_rows // TARGET_PARTS)
        size = max(1, min(size, MAX_PART_BYTES // self.bytes_per_row(model)))
        return size // self.alignment * self.alignment or size


@dataclass(frozen=True)
class GenerateTask(InferenceTask):
    """Samples: columns id, label (if the run has classes) and image.

    Args:
        truncation: 0 to 1, for style-based generators; see `TrainedModel.generate`.
        label: Name or number of the only class to sample; None samples all classes.
    """

    dataset = None
    count: int
    seed: int
    truncation: float = 1.0
    label: str | None = None

    @property
    def num_rows(self) -> int:
        """The count."""
        return self.count

    def check(self, model: "TrainedModel") -> None:
        """Check that the generator has the truncation, and that it has learnt the class."""
        model.check_truncation(self.truncation)
        if self.label is not None:
            model.class_index(self.label)

    def note(self, model: "TrainedModel") -> str:
        """Say that latent vectors are drawn without the prior that the config asks for."""
        from cl_ray.model import NO_PRIOR

        return NO_PRIOR if model.prior is None and model.config.generator.prior_codes else ""

    def compute(self, model: "TrainedModel", start: int, stop: int) -> pa.Table:
        """Generate samples number `start` to `stop`."""
        rows = stop - start, self.seed, start
        images = model.generate(*rows, self.truncation, self.label)
        label = model.sample_labels(*rows, self.label)
        return _table(np.arange(start, stop), label, image=_tensor_column(images))


@dataclass(frozen=True)
class VariantsTask(InferenceTask):
    """Variants of every image of a split: columns id, label and origin (if any), source and image.

    A variant decodes its source's latent vector, scaled to mean square 1, plus Gaussian noise of
    standard deviation `distance`: 0 gives the reconstruction, a large distance a sample that has
    little to do with the source. The id is unique; `source` is the id of the source image.
    """

    dataset: Dataset
    split: str
    copies: int
    distance: float
    seed: int

    @property
    def num_rows(self) -> int:
        """Variants of the whole split."""
        return self.copies * self.dataset.info.splits[self.split].rows

    @property
    def alignment(self) -> int:
        """Variants of one row group."""
        return self.copies * self.dataset.info.row_group

    def check(self, model: "TrainedModel") -> None:
        """Check that the dataset has the labels that the run needs."""
        model.check_classes(self.dataset)
        rows = self.dataset.info.splits[self.split].rows
        without = rows - self.dataset.info.labelled_rows(self.split)
        if without and model.config.condition == "projection":
            raise UserError(
                f"{without:,} of the {rows:,} images of the split {self.split} of "
                f"{self.dataset.location} have no label, and this run generates images of a given "
                "class (condition projection): use labelled data."
            )

    def compute(self, model: "TrainedModel", start: int, stop: int) -> pa.Table:
        """Compute variants number `start` to `stop`; each source is read and encoded once."""
        number = np.arange(start, stop)
        row, copy = number // self.copies, number % self.copies
        rows = read_rows(self.dataset, self.split, int(row[0]), int(row[-1]) + 1)
        picked = row - row[0]
        sources = rows.take(picked)
        latents = model.encode(rows.image)[picked]
        latents = latents + self.distance * model.noise(len(latents), self.seed, start)
        classes = None
        if model.classes:
            classes = np.full(len(picked), UNLABELLED) if sources.label is None else sources.label
            if (missing := classes == UNLABELLED).any():
                classes = np.where(missing, model.classify(rows.image)[picked], classes)
        images = _tensor_column(model.decode(latents, labels=classes))
        ids, source = sources.id * self.copies + copy, pa.array(sources.id)
        return _table(ids, sources.label, sources.origin, source=source, image=images)


@dataclass(frozen=True)
class EmbedTask(InferenceTask):
    """D's representation of every image of a split: id, label and origin (if any), embedding."""

    noun = "embeddings"
    dataset: Dataset
    split: str

    @property
    def num_rows(self) -> int:
        """Images of the split."""
        return self.dataset.info.splits[self.split].rows

    @property
    def alignment(self) -> int:
        """Images of one row group."""
        return self.dataset.info.row_group

    def bytes_per_row(self, model: "TrainedModel") -> int:
        """Return the bytes of an embedding."""
        return 4 * model.discriminator.representation_dim

    def compute(self, model: "TrainedModel", start: int, stop: int) -> pa.Table:
        """Compute the columns of images `start` to `stop`, MAX_PART_BYTES of pixels at a time.

        The pixels of a part may be many times its result.
        """
        if start == stop:
            return self.compute(model, 0, 1).slice(0, 0)
        step = max(1, MAX_PART_BYTES // int(np.prod(model.shape)))
        pieces = []
        for first, last in pairwise([*range(start, stop, step), stop]):
            rows = read_rows(self.dataset, self.split, first, last)
            columns = self.columns(model, rows.image)
            pieces.append(_table(rows.id, rows.label, rows.origin, **columns))
        return pa.concat_tables(pieces)

    def columns(self, model: "TrainedModel", images: NDArray[np.uint8]) -> dict[str, pa.Array]:
        """Embed images, as fixed-size lists of float32."""
        values = model.embed(images)
        element = pa.field("element", pa.float32(), nullable=False)
        column = pa.FixedSizeListArray.from_arrays(
            pa.array(values.reshape(-1)), type=pa.list_(element, values.shape[1])
        )
        return {"embedding": column}


@dataclass(frozen=True)
class ScoreTask(EmbedTask):
    """Novelty of a split beside `known`: id, label and origin (if any), novelty and distance."""

    noun = "scores"
    known: Dataset

    def check(self, model: "TrainedModel") -> None:
        """Check that the images to compare with are of the run's shape and enough."""
        model.check_shape(self.known)
        self.note(model)

    def note(self, model: "TrainedModel") -> str:
        """Say which images the others are compared with."""
        from cl_ray.novelty import describe_known

        note = describe_known(self.known)
        same = self.dataset.info.fingerprint == self.known.info.fingerprint
        if same and self.split == TRAIN_SPLIT:
            note += " Training images are compared with themselves, too: they seem less novel."
        return note

    def describe(self) -> dict[str, Any]:
        """Return all that decides the result, besides the model, as plain values."""
        known = {"known": self.known.location, "known digest": self.known.info.fingerprint}
        return super().describe() | known

    def columns(self, model: "TrainedModel", images: NDArray[np.uint8]) -> dict[str, pa.Array]:
        """Score images."""
        scores = model.novelty(images, self.known)
        return {name: pa.array(x) for name, x in scores._asdict().items()}


def read_rows(dataset: Dataset, split: str, start: int, stop: int) -> RowBatch:
    """Read rows [start, stop) of a split, in stored order, with their origins."""
    ranges = dataset.row_groups(split).rows(start, stop)
    return dataset.read(split, ranges, origins=True)


def _tensor_column(images: NDArray[np.uint8]) -> pa.Array:
    """Convert [n, H, W, C] to a column of fixed-shape tensors."""
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(images))


def _table(
    ids: NDArray[np.int64],
    label: NDArray[np.int64] | None,
    origin: NDArray[np.object_] | None = None,
    **columns: pa.Array,
) -> pa.Table:
    """Build a table with id, label and origin first."""
    labels = {} if label is None else {"label": pa.array(label, mask=label == UNLABELLED)}
    origins = {} if origin is None else {"origin": pa.array(origin, pa.string())}
    return pa.table({"id": pa.array(ids), **labels, **origins, **columns})
