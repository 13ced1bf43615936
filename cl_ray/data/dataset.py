"""A dataset at rest: a folder of Parquet shards and `dataset.json`, read by row group.

It has a reader of its own, and not `pyarrow.dataset` or `ray.data.read_parquet`, because those
neither check page checksums, nor address rows by row group, nor find the packaged digits, whose
path differs from node to node. Imports neither torch nor ray, so that reading processes start fast.
"""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.resources import files
from typing import Any, Literal, overload

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator

from cl_ray.base_config import BaseConfig
from cl_ray.data.decoding import MAX_SIDE, MIN_SIDE, Encoding, decode_pixels
from cl_ray.errors import UserError, first_error_line
from cl_ray.storage import absolute_location, open_filesystem
from cl_ray.uri import redact

INFO_FILE = "dataset.json"
PACKAGED = "mnist"
STACKED = "stacked-mnist"
"""A source that is made of the packaged digits, see `stacked_mnist.py`."""
STACKED_COUNTS = {"train": 60_000, "validation": 10_000, "test": 10_000}
"""Default number of its images in each split."""
STACKED_SOURCE = "Stacked MNIST (Metz et al., 2017) of the packaged digits"
"""The beginning of its `source` in dataset.json; the seed follows."""
DISTANCE_SIDE = 64
"""Pixels of a side that distances between images are taken over, at most."""
QUANTILES = np.linspace(0, 1, 101)
UNLABELLED = -1
"""The label in a `RowBatch` of a row that has none, where others have one; null in the files."""
MAX_CLASSES = 10_000
"""More different labels are no classes."""

_REPAIR = "copy it again or write the dataset again with `cl-ray data --overwrite`"
_SAMPLED_GROUPS = 256
"""`sample_rows` draws from at least this many random row groups, where there are more."""
_READ_GROUPS, _READ_THREADS = 16, 4
"""Row groups that are fetched together, and threads that fetch and decode."""


class ShardInfo(BaseConfig):
    """One Parquet file of a split."""

    file: str = Field(pattern=r"^[^/\\]+\.parquet$")
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SplitInfo(BaseConfig):
    """One split: its files, in order, and the distances between its images.

    `unlabelled` counts the rows without a label, in data that has labels, and `label_counts` those
    of each label; in older records it is None.

    `distances` holds the quantiles 0, 0.01 ... 1 of the Euclidean distance between two different
    rows, pixels scaled to [0, 1] and as many as `distance_stride` says, estimated from a uniform
    sample; empty if there is one row.
    """

    rows: int = Field(ge=1)
    unlabelled: int = Field(0, ge=0)
    label_counts: dict[int, int] | None = None
    shards: list[ShardInfo]
    distances: list[float]

    @model_validator(mode="after")
    def _check_totals(self) -> "SplitInfo":
        if sum(shard.rows for shard in self.shards) != self.rows:
            raise ValueError("the rows of its shards do not add up to its rows")
        if len(self.distances) not in (0, len(QUANTILES)):
            raise ValueError(f"distances holds {len(self.distances)} values instead of 101")
        counts = self.label_counts
        if counts is not None and sum(counts.values()) + self.unlabelled != self.rows:
            raise ValueError("the counts of its labels do not add up to its rows")
        return self


class DatasetInfo(BaseConfig):
    """The content of `dataset.json`."""

    format_version: Literal[2] = 2
    name: str
    source: str = Field(description="Where the images are from.")
    licence: str | None
    shape: tuple[int, int, int] = Field(description="Height, width, channels.")
    encoding: Encoding = Field("raw", description="How images are stored.")
    labelled: bool = Field(description="Whether any row has a label.")
    origins: bool = Field(False, description="Whether the rows say where in the source they were.")
    classes: list[str] | None = Field(description="The name of each label, if they have names.")
    predicted_labels: str = Field(
        "", description="How labels of training images were predicted; empty if none were."
    )
    row_group: int = Field(ge=1, description="Rows of every row group but a file's last.")
    splits: dict[str, SplitInfo]

    @field_validator("*")
    @classmethod
    def _check_uri(cls, value: Any, info: ValidationInfo) -> Any:
        """Read the record of any data, but without what may be secret in it."""
        return redact(value) if isinstance(value, str) else value

    @field_validator("shape")
    @classmethod
    def _check_shape(cls, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        height, width, channels = shape
        if height != width or not MIN_SIDE <= height <= MAX_SIDE or channels not in (1, 3):
            raise ValueError(f"{shape} is not a square of {MIN_SIDE} to {MAX_SIDE}, grey or RGB")
        return shape

    def labelled_rows(self, split: str) -> int:
        """Return how many rows of a split have a label."""
        return self.splits[split].rows - self.splits[split].unlabelled if self.labelled else 0

    @property
    def photographic(self) -> bool:
        """Whether the images are in colour. Stacked digits are three grey images."""
        return self.shape[2] == 3 and not self.source.startswith(STACKED_SOURCE)

    @property
    def fingerprint(self) -> str:
        """A digest of the images, their order, labels and classes, wherever the files lie."""
        fields = {"shape", "classes", "row_group"}
        if self.encoding != "raw":  # raw data have the fingerprint of older versions
            fields.add("encoding")
        described = self.model_dump(mode="json", include=fields)
        splits = {
            name: [(shard.sha256, shard.rows) for shard in split.shards]
            for name, split in self.splits.items()
        }
        text = json.dumps({**described, "splits": splits}, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of one row group of one shard."""

    shard: int
    group: int
    start: int
    stop: int

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self.stop - self.start


@dataclass(frozen=True)
class RowGroups(Sequence[RowRange]):
    """Row groups of a split in some order, as arrays: 100 million images have a million of them.

    Args:
        shard: [n] int32.
        group: [n] int32, the index in its shard.
        size: [n] int32, its rows.
    """

    shard: NDArray[np.int32]
    group: NDArray[np.int32]
    size: NDArray[np.int32]

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """[n + 1], the number of rows before each row group, and that of all."""
        return np.concatenate([[0], np.cumsum(self.size, dtype=np.int64)])

    @property
    def total(self) -> int:
        """The rows of all."""
        return int(self._ends[-1])

    def __len__(self) -> int:
        return len(self.size)

    @overload
    def __getitem__(self, index: int) -> RowRange: ...
    @overload
    def __getitem__(self, index: slice) -> list[RowRange]: ...
    def __getitem__(self, index: int | slice) -> RowRange | list[RowRange]:
        if isinstance(index, slice):
            return [self[k] for k in range(*index.indices(len(self)))]
        return RowRange(int(self.shard[index]), int(self.group[index]), 0, int(self.size[index]))

    def take(self, order: NDArray[np.integer]) -> "RowGroups":
        """Return the row groups at indices."""
        return RowGroups(self.shard[order], self.group[order], self.size[order])

    def rows(self, first: int, end: int) -> list[RowRange]:
        """Return rows [first, end) of the concatenation of all row groups."""
        if first >= end:
            return []
        low, high = np.searchsorted(self._ends, [first, end - 1], side="right") - 1
        ranges = self[int(low) : int(high) + 1]
        before, last = int(self._ends[low]), int(self._ends[high])
        ranges[-1] = replace(ranges[-1], stop=end - last)
        ranges[0] = replace(ranges[0], start=first - before)
        return ranges


@dataclass(frozen=True)
class RowBatch:
    """Rows of a dataset, as numpy arrays.

    Args:
        id: [n] int64, each row's index in the source's order, unique within the split.
        image: [n, H, W, C] uint8.
        label: [n] int64, UNLABELLED for a row without a label; None where no row of the data has
            one.
        origin: [n] str, where in the source each row was; None where that is unknown or not read.
    """

    id: NDArray[np.int64]
    image: NDArray[np.uint8]
    label: NDArray[np.int64] | None
    origin: NDArray[np.object_] | None = None

    def take(self, rows: Any) -> "RowBatch":
        """Return the rows at indices, in a slice or in a mask."""
        label = None if self.label is None else self.label[rows]
        origin = None if self.origin is None else self.origin[rows]
        return RowBatch(self.id[rows], self.image[rows], label, origin)

    def sorted_by_id(self) -> "RowBatch":
        """Return the rows in the source's order."""
        return self.take(np.argsort(self.id, kind="stable"))

    def labelled(self) -> "RowBatch":
        """Return the rows that have a label; if none has, all rows, with `label` None."""
        if self.label is None or (self.label != UNLABELLED).all():
            return self
        known = self.label != UNLABELLED
        return self.take(known) if known.any() else replace(self, label=None)


def distance_stride(side: int) -> int:
    """Return which pixels of a side count for distances: all (1), every second one (2) ..."""
    return -(-side // DISTANCE_SIDE)


def absolute_dataset_location(location: str) -> str:
    """Return where a dataset is, or `mnist`, so that it means the same in any working directory."""
    return location if location == PACKAGED else absolute_location(location)


def open_dataset_location(location: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem that holds a dataset and the path on it.

    Args:
        location: `mnist` (the packaged set), a local path, or a URI such as `s3://bucket/key`.

    Raises:
        UserError: The URI's filesystem is unknown or cannot be reached.
    """
    if location == PACKAGED:
        return pafs.LocalFileSystem(), str(files("cl_ray.data").joinpath(PACKAGED))
    return open_filesystem(location)


@dataclass(frozen=True)
class Dataset:
    """A dataset that was found and checked. Small and picklable: it holds no open file.

    Args:
        location: `mnist`, an absolute local path, or a URI.
        info: The content of its `dataset.json`.

    Raises:
        UserError: Methods that take a split raise it if there is no such split, and those that read
            if a file is damaged or cannot be read.
    """

    location: str
    info: DatasetInfo

    @classmethod
    def open(cls, location: str) -> "Dataset":
        """Open a dataset, and check that each file is there with the recorded size.

        Args:
            location: `mnist` (the packaged one; `./mnist` is a folder of that name), a folder, or
                the URI of one on any filesystem that pyarrow knows (`s3://`, `gs://`, `file://`).

        Raises:
            UserError: There is no dataset, or an incomplete one.
        """
        filesystem, path = open_dataset_location(location)
        try:
            sizes = _file_sizes(filesystem, path)
            if sizes is None and location == STACKED:
                raise UserError(
                    f"{STACKED} has to be made first: `cl-ray data --source {STACKED} --out "
                    f"data/{STACKED}`, then give data/{STACKED}."
                )
            if sizes is None:
                raise UserError(
                    f"{location} is not a folder: give `{PACKAGED}` or a folder that "
                    "`cl-ray data --source SOURCE --out FOLDER` wrote."
                )
            if INFO_FILE not in sizes:
                raise UserError(
                    f"{location} has no {INFO_FILE}: make a dataset of it with "
                    f"`cl-ray data --source {location} --out data/NAME`."
                )
            with filesystem.open_input_stream(f"{path}/{INFO_FILE}") as stream:
                text = stream.read()
        except OSError as error:
            raise UserError(f"{location} cannot be read: {first_error_line(error)}.") from error
        try:
            info = DatasetInfo.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UserError(
                f"{location}/{INFO_FILE} is not the record of a dataset "
                f"({field + ': ' if field else ''}{first['msg']}): write it again with "
                "`cl-ray data --overwrite`."
            ) from error
        for shard in (shard for split in info.splits.values() for shard in split.shards):
            if shard.file not in sizes:
                raise UserError(f"{location}/{shard.file} is missing: {_REPAIR}.")
            if sizes[shard.file] != shard.bytes:
                raise UserError(
                    f"{location}/{shard.file} has {sizes[shard.file]:,} bytes and not the "
                    f"{shard.bytes:,} recorded: {_REPAIR}."
                )
        return cls(absolute_dataset_location(location), info)

    def check_same(self, fingerprint: str | None) -> None:
        """Check that these are the images that a run or a search was started on.

        Args:
            fingerprint: `DatasetInfo.fingerprint` as it was recorded; None if it was not.

        Raises:
            UserError: They are others.
        """
        if fingerprint not in (None, self.info.fingerprint):
            raise UserError(
                f"{self.location} has other images or classes than it was started on (fingerprint "
                f"{self.info.fingerprint}, not {fingerprint}): give the same data, or take "
                "another --name."
            )

    def row_groups(self, split: str) -> RowGroups:
        """Return all row groups of a split, in order."""
        size = self.info.row_group
        rows = np.array([shard.rows for shard in self._split(split).shards])
        counts = -(-rows // size)
        shard = np.repeat(np.arange(len(rows)), counts)
        group = np.arange(len(shard)) - np.repeat(np.cumsum(counts) - counts, counts)
        sizes = np.minimum(size, rows[shard] - group * size)
        return RowGroups(*(column.astype(np.int32) for column in (shard, group, sizes)))

    def read(
        self, split: str, ranges: Sequence[RowRange] | None = None, origins: bool = False
    ) -> RowBatch:
        """Read rows; only the row groups that hold them are read.

        Args:
            split: A name in `info.splits`.
            ranges: The rows, returned in this order; None is the whole split. Ranges may overlap.
            origins: Read where in the source each row was, too, if that is known.
        """
        shards = self._split(split).shards
        if ranges is None:
            ranges = self.row_groups(split)
        offsets = np.cumsum([0, *(part.rows for part in ranges)])
        columns: dict[str, NDArray[Any]] = {
            "id": np.empty(offsets[-1], np.int64),
            "image": np.empty((offsets[-1], *self.info.shape), np.uint8),
        }
        if self.info.labelled:
            columns["label"] = np.empty(offsets[-1], np.int64)
        if origins and self.info.origins:
            columns["origin"] = np.empty(offsets[-1], object)
        wanted: dict[int, dict[int, list[int]]] = {}  # by shard and row group, indices of ranges
        for index, part in enumerate(ranges):
            wanted.setdefault(part.shard, {}).setdefault(part.group, []).append(index)

        def fill(part: tuple[int, list[int]]) -> None:
            shard, groups = shards[part[0]], part[1]
            with self._open(shard) as file:
                for group, rows in self._row_groups(file, shard, groups, list(columns)):
                    for index in wanted[part[0]][group]:
                        target = slice(offsets[index], offsets[index + 1])
                        found = rows.slice(ranges[index].start, ranges[index].rows)
                        self._decode(found["image"], ranges[index], columns["image"][target])
                        columns["id"][target] = _integers(found["id"])
                        if "label" in columns:
                            columns["label"][target] = _labels(found["label"])
                        if "origin" in columns:
                            columns["origin"][target] = found["origin"].to_pylist()

        parts = [
            (shard, sorted(by_group)[k : k + _READ_GROUPS])
            for shard, by_group in wanted.items()
            for k in range(0, len(by_group), _READ_GROUPS)
        ]
        if len(parts) > 1:  # hides the latency of a remote filesystem, and decodes on several CPUs
            with ThreadPoolExecutor(_READ_THREADS) as pool:
                list(pool.map(fill, parts))
        elif parts:
            fill(parts[0])
        label, origin = columns.get("label"), columns.get("origin")
        return RowBatch(columns["id"], columns["image"], label, origin)

    def distance_quantile(self, split: str, q: float) -> float:
        """Return a quantile of the distances between two images of a split, for q in [0, 1].

        Distances are Euclidean, pixels scaled to [0, 1]; it is interpolated between recorded ones.

        Raises:
            UserError: The split has one row only.
            ValueError: `q` is not in [0, 1].
        """
        if not 0 <= q <= 1:
            raise ValueError(f"{q} is not in [0, 1]")
        distances = self._split(split).distances
        if not distances:
            raise UserError(
                f"The split {split} of {self.location} has one image only, so no two differ: "
                "add images."
            )
        return float(np.interp(q, QUANTILES, distances))

    def class_names(self) -> list[str]:
        """Return the names of the labels 0, 1, ...: their numbers if they have no names.

        Raises:
            UserError: There are no labels, or they do not count classes from 0.
        """
        if not self.info.labelled:
            raise UserError(f"{self.location} has no labels.")
        if self.info.classes is not None:
            return list(self.info.classes)
        labels = set[int]().union(*map(self._label_counts, self.info.splits))
        low, high = min(labels), max(labels)
        if low < 0 or high >= MAX_CLASSES:
            raise UserError(
                f"The labels of {self.location} are {low} to {high}; numbers of classes are "
                f"0 to {MAX_CLASSES - 1} at most: write the dataset again with such labels."
            )
        return [str(number) for number in range(high + 1)]

    def class_counts(self, split: str) -> list[int]:
        """Count the labelled rows of each class of `class_names` in a split."""
        names, counts = self.class_names(), self._label_counts(split)
        return [counts.get(label, 0) for label in range(len(names))]

    def read_labels(self, split: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Read the ids and the labels of all rows of a split of labelled data, without images."""
        ids, labels = [], []
        for shard in self._split(split).shards:
            with self._open(shard) as file:
                table = file.read(["id", "label"]).slice(0, shard.rows)
                ids.append(_integers(table["id"].combine_chunks()))
                labels.append(_labels(table["label"].combine_chunks()))
        return np.concatenate(ids), np.concatenate(labels)

    def only_label(self, split: str) -> int | None:
        """Return the label that all labelled rows of a split have; None if there are several."""
        counts = self._label_counts(split)
        return next(iter(counts)) if len(counts) == 1 else None

    def _label_counts(self, split: str) -> dict[int, int]:
        """Return how many rows have each label: as recorded or, of older data, as read."""
        recorded = self._split(split).label_counts
        return counts_by_label(self.read_labels(split)[1]) if recorded is None else recorded

    def _split(self, split: str) -> SplitInfo:
        try:
            return self.info.splits[split]
        except KeyError:
            names = ", ".join(self.info.splits)
            raise UserError(f"{self.location} has no split {split}: it has {names}.") from None

    def _row_groups(
        self, file: pq.ParquetFile, shard: ShardInfo, groups: list[int], columns: list[str]
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield row groups of a file one by one, so that what is read stays small and in cache."""
        size, shape, encoding = self.info.row_group, self.info.shape, self.info.encoding
        kind = pa.binary(math.prod(shape) if encoding == "raw" else -1)
        found = file.schema_arrow.field("image").type
        is_older = encoding == "raw" and found == pa.fixed_shape_tensor(pa.uint8(), shape)
        if found != kind and not is_older:
            raise pa.ArrowInvalid(f"its images are {found} and not {kind}")
        # Every row group but a file's last has `size` rows, so a batch is a row group.
        batches = file.iter_batches(size, groups, columns)
        for group, batch in zip(groups, batches, strict=True):
            expected = min(size, shard.rows - group * size)
            if len(batch) != expected:
                raise pa.ArrowInvalid(f"{len(batch)} rows where {expected} are recorded")
            yield group, batch

    def _decode(self, cells: pa.Array, part: RowRange, images: NDArray[np.uint8]) -> None:
        """Decode the cells of a range of rows into an array [n, H, W, C]."""
        if isinstance(cells, pa.ExtensionArray):  # raw pixels in older data
            images[:] = cells.to_numpy_ndarray()
        elif self.info.encoding == "raw" and not cells.null_count:
            pixels = np.frombuffer(cells.buffers()[1], np.uint8).reshape(-1, *self.info.shape)
            images[:] = pixels[cells.offset : cells.offset + len(cells)]
        else:
            for row, data in enumerate(cells.to_pylist()):
                try:
                    images[row] = decode_pixels(data or b"", self.info.encoding, self.info.shape)
                except ValueError as error:
                    number = part.group * self.info.row_group + part.start + row
                    raise ValueError(f"row {number}: {error}") from error

    @contextmanager
    def _open(self, shard: ShardInfo) -> Iterator[pq.ParquetFile]:
        """Open a file; report whatever goes wrong in reading it as one UserError."""
        filesystem, path = open_dataset_location(self.location)
        try:
            with pq.ParquetFile(
                f"{path}/{shard.file}",
                filesystem=filesystem,
                page_checksum_verification=True,
                pre_buffer=True,
            ) as file:
                yield file
        except (OSError, ValueError, KeyError, pa.ArrowException) as error:
            raise UserError(
                f"{self.location}/{shard.file} is damaged or cannot be read "
                f"({first_error_line(error)}): {_REPAIR}."
            ) from error


def counts_by_label(labels: NDArray[np.int64]) -> dict[int, int]:
    """Return how many rows have each label."""
    values, counts = np.unique(labels, return_counts=True)
    found = zip(values.tolist(), counts.tolist(), strict=True)
    return {label: count for label, count in found if label != UNLABELLED}


def read_info(location: str | None) -> DatasetInfo | None:
    """Return what describes a dataset; None if it cannot be opened."""
    if location is None:
        return None
    try:
        return Dataset.open(location).info
    except UserError:  # is raised again, with the checks of the other fields
        return None


def sample_rows(
    dataset: Dataset, split: str, count: int, seed: int, labelled: bool = False
) -> RowBatch:
    """Draw rows of a split at random without repetition; all of them if it has no more.

    They come from a few hundred random row groups of a large split, to read less of it. Of data
    that are partly labelled, `labelled` draws among all rows that have a label.
    """
    random = np.random.default_rng([seed, 1])
    groups = dataset.row_groups(split)
    if labelled and dataset.info.labelled_rows(split) and dataset.info.splits[split].unlabelled:
        known = np.flatnonzero(dataset.read_labels(split)[1] != UNLABELLED)
        chosen = random.permutation(known)[:count].tolist()
        return dataset.read(split, [groups.rows(row, row + 1)[0] for row in chosen], origins=True)
    needed = -(-count // dataset.info.row_group) + len(dataset.info.splits[split].shards)
    drawn = groups.take(random.permutation(len(groups))[: max(_SAMPLED_GROUPS, needed)])
    rows = random.permutation(drawn.total)[:count].tolist()
    return dataset.read(split, [drawn.rows(row, row + 1)[0] for row in rows], origins=True)


def _file_sizes(filesystem: pafs.FileSystem, path: str) -> dict[str, int] | None:
    """Return the size of each file in a folder, from one listing; None if it is no folder."""
    try:
        listing = filesystem.get_file_info(pafs.FileSelector(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return {info.base_name: info.size for info in listing if info.type == pafs.FileType.File}


def _integers(column: pa.Array) -> NDArray[np.int64]:
    """Return a column without copying it; `to_numpy` would import pandas for half a second."""
    return np.from_dlpack(column).astype(np.int64, copy=False)


def _labels(column: pa.Array) -> NDArray[np.int64]:
    """Return a column of labels, null as UNLABELLED; `fill_null` imports pandas, too."""
    return _integers(column.fill_null(UNLABELLED) if column.null_count else column)
