"""A data set at rest: a folder of Parquet shards and `dataset.json`, read by row group.

Free of torch and ray: pyarrow and numpy only, so that any process reads it at once.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field, ValidationError, field_validator, model_validator

from cl_ray.base_config import BaseConfig
from cl_ray.errors import UserError

INFO_FILE = "dataset.json"
PACKAGED = "mnist"
STACKED = "stacked-mnist"
"""A source that is made of the packaged digits, see `stacked.py`."""
SMALLEST, LARGEST = 28, 64
QUANTILES = np.linspace(0, 1, 101)
MOST_CLASSES = 10_000
"""Labels beyond this are taken for numbers of something else."""


class ShardInfo(BaseConfig):
    """One Parquet file of a split."""

    file: str = Field(pattern=r"^[^/\\]+\.parquet$")
    rows: int = Field(ge=1)
    bytes: int = Field(ge=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class SplitInfo(BaseConfig):
    """One split: its files, in order, and how far apart its images are.

    `distances` holds the quantiles 0, 0.01 ... 1 of the Euclidean distance between two different
    rows, pixels scaled to [0, 1], estimated from a uniform sample; empty if there is one row.
    """

    rows: int = Field(ge=1)
    shards: list[ShardInfo]
    distances: list[float]

    @model_validator(mode="after")
    def _adds_up(self) -> "SplitInfo":
        if sum(shard.rows for shard in self.shards) != self.rows:
            raise ValueError("the rows of its shards do not add up to its rows")
        if len(self.distances) not in (0, len(QUANTILES)):
            raise ValueError(f"distances holds {len(self.distances)} values instead of 101")
        return self


class DatasetInfo(BaseConfig):
    """What `dataset.json` says."""

    format_version: Literal[1] = 1
    name: str
    source: str = Field(description="Where the images are from.")
    licence: str | None
    shape: tuple[int, int, int] = Field(description="Height, width, channels.")
    labelled: bool = Field(description="Whether the rows have labels.")
    classes: list[str] | None = Field(description="The name of each label, if they have names.")
    row_group: int = Field(ge=1, description="Rows of every row group but a file's last.")
    splits: dict[str, SplitInfo]

    @field_validator("shape")
    @classmethod
    def _is_square(cls, shape: tuple[int, int, int]) -> tuple[int, int, int]:
        height, width, channels = shape
        if height != width or not SMALLEST <= height <= LARGEST or channels not in (1, 3):
            raise ValueError(f"{shape} is not a square of {SMALLEST} to {LARGEST}, grey or RGB")
        return shape


@dataclass(frozen=True)
class RowRange:
    """Rows [start, stop) of one row group of one shard."""

    shard: int
    group: int
    start: int
    stop: int


@dataclass(frozen=True)
class RowBatch:
    """Rows of a data set, as numpy arrays.

    Attributes:
        id: [n] int64, each row's number in the source's order, unique within the split.
        image: [n, H, W, C] uint8.
        label: [n] int64, or None where the data has no labels.
    """

    id: NDArray[np.int64]
    image: NDArray[np.uint8]
    label: NDArray[np.int64] | None


def open_filesystem(location: str) -> tuple[pafs.FileSystem, str]:
    """Returns the filesystem that holds `location` and the path inside it.

    Args:
        location: `mnist` (the packaged set), a local path, or a URI such as `s3://bucket/key`.

    Raises:
        UserError: if the URI's filesystem is unknown or cannot be reached.
    """
    return _connect(absolute_location(location))


def absolute_location(location: str) -> str:
    """Returns `location` so that it means the same in any working folder."""
    if "://" in location or location == PACKAGED:
        return location
    return os.path.abspath(os.path.expanduser(location))


def without_secrets(location: str) -> str:
    """Returns `location` without the keys and options that a URI may carry."""
    scheme, mark, _ = location.partition("://")
    return f"{scheme}{mark}{open_filesystem(location)[1]}" if mark else location


@lru_cache(maxsize=32)
def _connect(location: str) -> tuple[pafs.FileSystem, str]:
    if location == PACKAGED:
        return pafs.LocalFileSystem(), str(files("cl_ray.data").joinpath(PACKAGED))
    if "://" not in location:
        return pafs.LocalFileSystem(), location
    try:
        filesystem, path = pafs.FileSystem.from_uri(location)
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{location} cannot be opened: {first_error_line(error)}.") from error
    return filesystem, path.rstrip("/")


def first_error_line(error: BaseException) -> str:
    """Returns the first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


@dataclass(frozen=True)
class Dataset:
    """A data set that was found and checked. Small and picklable: it holds no open file.

    Attributes:
        location: `mnist`, an absolute local path, or a URI.
        info: what its `dataset.json` says.
    """

    location: str
    info: DatasetInfo

    @classmethod
    def open(cls, location: str) -> "Dataset":
        """Finds a data set and checks that it is whole: each file there, with the recorded size.

        Args:
            location: `mnist` (the packaged one; `./mnist` is a folder of that name), a folder, or
                the URI of one on any filesystem that pyarrow knows (`s3://`, `gs://`, `file://`).

        Raises:
            UserError: if there is no data set, or not a whole one.
        """
        filesystem, path = open_filesystem(location)
        make = f"`cl-ray data --source {location} --out data/NAME`"
        try:
            sizes = _sizes(filesystem, path)
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
                    f"{location} has no {INFO_FILE}: make a data set of it with {make}."
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
                f"{location}/{INFO_FILE} is not the record of a data set "
                f"({field + ': ' if field else ''}{first['msg']}): write it again with "
                "`cl-ray data --overwrite`."
            ) from error
        for split in info.splits.values():
            for shard in split.shards:
                if shard.file not in sizes:
                    raise UserError(
                        f"{location}/{shard.file} is missing: copy it again or write the data "
                        "set again with `cl-ray data --overwrite`."
                    )
                if sizes[shard.file] != shard.bytes:
                    raise UserError(
                        f"{location}/{shard.file} has {sizes[shard.file]:,} bytes and not the "
                        f"{shard.bytes:,} recorded: copy it again or write the data set again "
                        "with `cl-ray data --overwrite`."
                    )
        return cls(absolute_location(location), info)

    def groups(self, split: str) -> list[int]:
        """Returns the number of rows of each row group of a split, in the order of `pieces`."""
        return [piece.stop for piece in self.pieces(split)]

    def pieces(self, split: str) -> list[RowRange]:
        """Returns all row groups of a split, whole, in order."""
        size = self.info.row_group
        return [
            RowRange(number, group, 0, min(size, shard.rows - group * size))
            for number, shard in enumerate(self._split(split).shards)
            for group in range(-(-shard.rows // size))
        ]

    def read(self, split: str, pieces: Sequence[RowRange] | None = None) -> RowBatch:
        """Reads rows, in the order of `pieces`; only the row groups that they touch are read.

        Args:
            split: a name in `info.splits`.
            pieces: what to read; None is the whole split. A piece may be named more than once.

        Raises:
            UserError: if the split is unknown, or a file is damaged or cannot be read.
        """
        shards = self._split(split).shards
        if pieces is None:
            pieces = self.pieces(split)
        offsets = np.cumsum([0, *(piece.stop - piece.start for piece in pieces)])
        ids = np.empty(offsets[-1], np.int64)
        images = np.empty((offsets[-1], *self.info.shape), np.uint8)
        labels = np.empty(offsets[-1], np.int64) if self.info.labelled else None
        wanted: dict[int, dict[int, list[int]]] = {}
        for number, piece in enumerate(pieces):
            wanted.setdefault(piece.shard, {}).setdefault(piece.group, []).append(number)
        for shard, of_group in wanted.items():
            for group, rows in self._groups(shards[shard], sorted(of_group)):
                for number in of_group[group]:
                    piece = pieces[number]
                    place = slice(offsets[number], offsets[number + 1])
                    ids[place] = rows.id[piece.start : piece.stop]
                    images[place] = rows.image[piece.start : piece.stop]
                    if labels is not None and rows.label is not None:
                        labels[place] = rows.label[piece.start : piece.stop]
        return RowBatch(ids, images, labels)

    def distance_quantile(self, split: str, q: float) -> float:
        """Returns a quantile of the distances between two images of a split.

        Args:
            split: a name in `info.splits`.
            q: in [0, 1].

        Returns:
            A Euclidean distance, pixels scaled to [0, 1]; interpolated between the recorded ones.

        Raises:
            UserError: if the split is unknown or has one row only.
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
        """Returns what the labels 0, 1, ... are called: by their numbers if they have no names.

        Raises:
            UserError: if there are no labels, or they do not count classes from 0.
        """
        if not self.info.labelled:
            raise UserError(f"{self.location} has no labels.")
        if self.info.classes is not None:
            return list(self.info.classes)
        ranges = [self._label_range(s) for split in self.info.splits.values() for s in split.shards]
        least, most = min(low for low, _ in ranges), max(high for _, high in ranges)
        if least < 0 or most >= MOST_CLASSES:
            raise UserError(
                f"The labels of {self.location} are {least} to {most}; numbers of classes are "
                f"0 to {MOST_CLASSES - 1} at most: write the data set again with such labels."
            )
        return [str(number) for number in range(most + 1)]

    def class_counts(self, split: str) -> list[int]:
        """Returns how many rows of a split each class of `class_names` has; reads labels only.

        Raises:
            UserError: as `class_names` and `read` do.
        """
        counts = np.zeros(len(self.class_names()), np.int64)
        for shard in self._split(split).shards:
            with self._open(shard) as file:
                labels = file.read(["label"])["label"].combine_chunks()
                counts += np.bincount(_integers(labels)[: shard.rows], minlength=len(counts))
        return counts.tolist()

    def only_label(self, split: str) -> int | None:
        """Returns the label that all rows of a split have; None if there are several.

        Raises:
            UserError: if there is no such split.
        """
        ranges = [self._label_range(shard) for shard in self._split(split).shards]
        least, most = min(low for low, _ in ranges), max(high for _, high in ranges)
        return least if least == most else None

    def _label_range(self, shard: ShardInfo) -> tuple[int, int]:
        """Returns a file's least and largest label, from its footer."""
        filesystem, path = open_filesystem(self.location)
        with pq.ParquetFile(f"{path}/{shard.file}", filesystem=filesystem) as file:
            column = file.schema_arrow.get_field_index("label")
            groups = [file.metadata.row_group(n) for n in range(file.num_row_groups)]
            found = [group.column(column).statistics for group in groups]
        return min(s.min for s in found), max(s.max for s in found)

    def _split(self, split: str) -> SplitInfo:
        try:
            return self.info.splits[split]
        except KeyError:
            there = ", ".join(self.info.splits)
            raise UserError(f"{self.location} has no split {split}: it has {there}.") from None

    def _groups(self, shard: ShardInfo, groups: list[int]) -> Iterator[tuple[int, RowBatch]]:
        """Yields some row groups of a file, one by one: what is decoded stays small and warm."""
        size = self.info.row_group
        with self._open(shard) as file:
            # Every row group but a file's last has `size` rows, so a batch is a row group.
            batches = file.iter_batches(size, groups)
            for group, batch in zip(groups, batches, strict=True):
                expected = min(size, shard.rows - group * size)
                if len(batch) != expected:
                    raise pa.ArrowInvalid(f"{len(batch)} rows where {expected} are recorded")
                label = _integers(batch["label"]) if self.info.labelled else None
                image = batch["image"].to_numpy_ndarray()
                yield group, RowBatch(_integers(batch["id"]), image, label)

    @contextmanager
    def _open(self, shard: ShardInfo) -> Iterator[pq.ParquetFile]:
        """Opens a file; whatever is wrong with what is read of it is said in one sentence."""
        filesystem, path = open_filesystem(self.location)
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
                f"({first_error_line(error)}): copy it again or write the data set again with "
                "`cl-ray data --overwrite`."
            ) from error


def _sizes(filesystem: pafs.FileSystem, path: str) -> dict[str, int] | None:
    """Returns the size of each file in a folder, from one listing; None if it is no folder."""
    try:
        listing = filesystem.get_file_info(pafs.FileSelector(path))
    except (FileNotFoundError, NotADirectoryError):
        return None
    return {info.base_name: info.size for info in listing if info.type == pafs.FileType.File}


def _integers(column: pa.Array) -> NDArray[np.int64]:
    """Returns a column without copying it; `to_numpy` would import pandas for half a second."""
    return np.from_dlpack(column).astype(np.int64, copy=False)
