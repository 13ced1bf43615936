"""Images → a folder of Parquet shards and `dataset.json`, whole or not at all.

The images of a split are first spooled, in the source's order, to one flat file on disk, and from
there written in a random order. So memory does not grow with the data, and every source, however
it is sorted, ends in the same well mixed order.
"""

import hashlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cl_ray.data.dataset import (
    INFO_FILE,
    LARGEST,
    PACKAGED,
    QUANTILES,
    SMALLEST,
    DatasetInfo,
    ShardInfo,
    SplitInfo,
    first_error_line,
    open_filesystem,
)
from cl_ray.errors import UserError

GROUP_BYTES = 2**20
GROUPS_PER_SHARD = 16
SAMPLE = 2048
REPORT_EVERY = 1000
SPLIT_NAMES = {"train": "train", "test": "test", "val": "val", "valid": "val", "validation": "val"}
"""What a source may call a split, and what it is called here."""
SHARD_FILE = re.compile(r"[a-z]+-\d{5}-of-\d{5}\.parquet")

Progress = Callable[[str, int, int | None], None]
"""Called with what is being done, how many images are done, and of how many (None: unknown)."""


@dataclass(frozen=True)
class RawImage:
    """One image on its way into a data set.

    Attributes:
        image: [H, W, C] uint8.
        label: its class, from 0 up; None if it has none.
        where: what to call it in a message.
        order: its place in the source's order; None is after the one before.
    """

    image: NDArray[np.uint8]
    label: int | None
    where: str
    order: int | None = None


@dataclass(frozen=True)
class DatasetMetadata:
    """What `dataset.json` says that the images themselves do not."""

    name: str
    source: str
    licence: str | None = None
    classes: list[str] | None = None


SourceSplits = tuple[dict[str, Iterable[RawImage]], DatasetMetadata]
"""The images of each split, read as they are asked for, and what is known about them."""


@dataclass(frozen=True)
class _Part:
    """A split on its way: images on disk, and which of them it has, in the source's order.

    Attributes:
        image: [m, H, W, C] uint8.
        label: [m] int64, or empty.
        rows: [n], of the m.
    """

    image: NDArray[np.uint8]
    label: NDArray[np.int64]
    rows: NDArray[np.intp]


def write_splits(
    splits: Mapping[str, Iterable[RawImage]],
    out: str,
    about: DatasetMetadata,
    *,
    test_fraction: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
    level: int = 3,
    progress: Progress | None = None,
) -> DatasetInfo:
    """Writes a data set.

    A local folder appears in one rename. On another filesystem `dataset.json` is written last, so
    that a folder half written is never taken for a data set.

    Args:
        splits: the images of `train`, and of `test` and `val` if there are such; all of one shape,
            all or none labelled.
        out: a folder or the URI of one.
        about: the rest of `dataset.json`.
        test_fraction: share of `train`, in [0, 1), drawn at random, that becomes the split `test`.
        seed: decides the order of the rows, those held out and the sample for the distances.
        overwrite: replace the data set that is at `out`.
        level: of zstd, 1 to 22.
        progress: see `Progress`.

    Raises:
        UserError: if `out` is taken or cannot be written, or the images do not go together.
    """
    check_output_free(out, overwrite)
    if test_fraction and "test" in splits:
        raise UserError("The source has a test split of its own: leave --test-fraction out.")
    filesystem, path = open_filesystem(out)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    parent, name = os.path.split(path)
    report = progress or (lambda stage, done, total: None)
    try:
        if local:
            os.makedirs(parent, exist_ok=True)
        # Beside a local `out`, so on the same disk; hidden, so that no source takes it for data.
        with TemporaryDirectory(prefix=f".{name}-", dir=parent if local else None) as work:
            parts = _spool(splits, work, about.classes, report)
            random = np.random.default_rng(seed)
            if test_fraction:
                parts |= _hold_out(parts["train"], test_fraction, random)
            if local:
                folder = os.path.join(work, "new")
            else:
                folder = path
                _clear(filesystem, folder)
            filesystem.create_dir(folder)
            shape = parts["train"].image.shape[1:]
            row_group = min(max(GROUP_BYTES // int(np.prod(shape)), 64), 1024)
            info = DatasetInfo(
                name=about.name,
                source=about.source,
                licence=about.licence,
                shape=shape,
                labelled=bool(parts["train"].label.size),
                classes=about.classes,
                row_group=row_group,
                splits={
                    split: SplitInfo(
                        rows=len(part.rows),
                        shards=_write_shards(
                            part, split, filesystem, folder, row_group, level, random, report
                        ),
                        distances=_distances(part, random),
                    )
                    for split, part in parts.items()
                },
            )
            with filesystem.open_output_stream(f"{folder}/{INFO_FILE}") as stream:
                stream.write((info.model_dump_json(indent=1) + "\n").encode())
            if local:
                replace_atomically(folder, path, os.path.join(work, "old"))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {first_error_line(error)}.") from error
    return info


def check_output_free(out: str, overwrite: bool) -> None:
    """Checks that a data set may be written to `out`.

    Raises:
        UserError: if something is there, unless it is a data set (or what is left of one) and
            `overwrite` is set.
    """
    if out == PACKAGED:
        raise UserError(f"{out} names the packaged data set: write to ./{out} or another --out.")
    filesystem, path = open_filesystem(out)
    try:
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            return
        if kind == pafs.FileType.File:
            raise UserError(f"{out} is a file: give a folder as --out.")
        there = [info.base_name for info in filesystem.get_file_info(pafs.FileSelector(path))]
    except OSError as error:
        raise UserError(f"{out} cannot be read: {first_error_line(error)}.") from error
    if not there:
        return
    foreign = [name for name in there if name != INFO_FILE and not SHARD_FILE.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]}, which is no part of a data set: give another --out."
        )
    if not overwrite:
        raise UserError(
            f"{out} is there already: give another --out, or --overwrite to replace it."
        )


def _spool(
    splits: Mapping[str, Iterable[RawImage]], work: str, classes: list[str] | None, report: Progress
) -> dict[str, _Part]:
    """Copies all images to flat files in the folder `work`; checks that they go together."""
    first: RawImage | None = None
    parts = {}
    for split in sorted(splits, key=list(SPLIT_NAMES).index):
        labels, order = array("q"), array("q")
        file = os.path.join(work, f"{split}.raw")
        with open(file, "wb") as stream:
            for picture in splits[split]:
                first = first or picture
                _check(picture, first, classes)
                stream.write(picture.image.tobytes())
                if picture.label is not None:
                    labels.append(picture.label)
                order.append(len(order) if picture.order is None else picture.order)
                if len(order) % REPORT_EVERY == 0:
                    report(f"reading {split}", len(order), None)
        if first is None or not order:
            raise UserError(f"There is no image in the split {split}: give another --source.")
        report(f"reading {split}", len(order), len(order))
        parts[split] = _Part(
            np.memmap(file, np.uint8, "r", shape=(len(order), *first.image.shape)),
            np.frombuffer(labels, np.int64) if labels else np.empty(0, np.int64),
            np.argsort(np.frombuffer(order, np.int64), kind="stable"),
        )
    return parts


def _check(picture: RawImage, first: RawImage, classes: list[str] | None) -> None:
    """Checks one image's shape and label, alone and against the first one's."""
    height, width, channels = picture.image.shape
    resize = "add `--size N` to scale the shorter side to N and cut out the middle"
    if (height, width) != first.image.shape[:2]:
        raise UserError(
            f"{picture.where} is {width} × {height} and {first.where} is "
            f"{first.image.shape[1]} × {first.image.shape[0]}: {resize}."
        )
    if height != width:
        raise UserError(f"{picture.where} is not square but {width} × {height}: {resize}.")
    if not SMALLEST <= height <= LARGEST:
        raise UserError(
            f"{picture.where} is {width} × {height}, and sides are {SMALLEST} to {LARGEST}: "
            f"{resize}."
        )
    if channels != first.image.shape[2]:
        kinds = {1: "grey", 3: "in colour"}
        raise UserError(
            f"{picture.where} is {kinds[channels]} and {first.where} is "
            f"{kinds[first.image.shape[2]]}: add `--color grey` or `--color rgb`."
        )
    without = "leave the labels out with `--label-column none`"
    if (picture.label is None) != (first.label is None):
        bare, labelled = (picture, first) if picture.label is None else (first, picture)
        raise UserError(f"{bare.where} has no label but {labelled.where} has one: {without}.")
    if picture.label is not None:
        if picture.label < 0:
            raise UserError(f"{picture.where} has the label {picture.label}: {without}.")
        if classes is not None and picture.label >= len(classes):
            raise UserError(
                f"{picture.where} has the label {picture.label}, but there are "
                f"{len(classes)} classes: {without}."
            )


def _hold_out(train: _Part, fraction: float, random: np.random.Generator) -> dict[str, _Part]:
    """Returns the splits `train` and `test` that the source's `train` falls into."""
    count = len(train.rows)
    tests = round(count * fraction)
    if not 0 < tests < count:
        raise UserError(
            f"--test-fraction {fraction} of {count} images leaves one split empty: choose another."
        )
    held = np.isin(np.arange(count), random.choice(count, tests, replace=False))
    return {
        "train": replace(train, rows=train.rows[~held]),
        "test": replace(train, rows=train.rows[held]),
    }


def _write_shards(
    part: _Part,
    split: str,
    filesystem: pafs.FileSystem,
    folder: str,
    row_group: int,
    level: int,
    random: np.random.Generator,
    report: Progress,
) -> list[ShardInfo]:
    """Writes the Parquet files of a split, rows in random order."""
    count = len(part.rows)
    mixed = random.permutation(count)
    groups = -(-count // row_group)
    files = -(-groups // GROUPS_PER_SHARD)
    shards = []
    for number in range(files):
        # Whole row groups a file, so that only the last one of the split is short.
        start, stop = (row_group * (groups * k // files) for k in (number, number + 1))
        data = _parquet(part, mixed[start:stop], row_group, level)
        name = f"{split}-{number:05d}-of-{files:05d}.parquet"
        with filesystem.open_output_stream(f"{folder}/{name}") as stream:
            stream.write(data)
        rows = min(stop, count) - start
        digest = hashlib.sha256(data).hexdigest()
        shards.append(ShardInfo(file=name, rows=rows, bytes=len(data), sha256=digest))
        report(f"writing {split}", start + rows, count)
    return shards


def _parquet(part: _Part, ids: NDArray[np.intp], row_group: int, level: int) -> memoryview:
    """Returns one Parquet file, of about GROUPS_PER_SHARD × GROUP_BYTES of pixels."""
    sink = pa.BufferOutputStream()
    writer: pq.ParquetWriter | None = None
    for start in range(0, len(ids), row_group):
        picked = ids[start : start + row_group]
        rows = part.rows[picked]
        image = pa.FixedShapeTensorArray.from_numpy_ndarray(part.image[rows])
        columns = {"id": pa.array(picked, pa.int64()), "image": image}
        if part.label.size:
            columns["label"] = pa.array(part.label[rows], pa.int64())
        fields = [pa.field(key, value.type, nullable=False) for key, value in columns.items()]
        table = pa.table(list(columns.values()), schema=pa.schema(fields))
        writer = writer or pq.ParquetWriter(
            sink,
            table.schema,
            compression="zstd",
            compression_level=level,
            # Parquet has no 8-bit integers: a pixel is stored as four bytes, three of them 0.
            # With those split off, the fourth ones stand together as in a raw image, which is
            # smaller and twice as fast to read as a dictionary.
            use_dictionary=False,
            column_encoding={"image.list.element": "BYTE_STREAM_SPLIT"},
            data_page_size=8 * GROUP_BYTES,
            write_page_checksum=True,
        )
        writer.write_table(table, row_group_size=row_group)
    if writer is not None:
        writer.close()
    return memoryview(sink.getvalue())


def _distances(part: _Part, random: np.random.Generator) -> list[float]:
    """Returns the quantiles of the distance between two rows, from a sample of them."""
    count = min(len(part.rows), SAMPLE)
    if count < 2:
        return []
    rows = part.rows[np.sort(random.choice(len(part.rows), count, replace=False))]
    pixels = part.image[rows].reshape(count, -1)
    products = np.zeros((count, count))
    for start in range(0, pixels.shape[1], 1024):
        # Whole numbers below 2**53, so exact: near twins keep their distance, and the result
        # does not depend on the order in which a library adds.
        block = pixels[:, start : start + 1024].astype(np.float64)
        products += block @ block.T
    squares = np.diagonal(products)
    pairs = np.triu_indices(count, 1)
    distances = np.sqrt((squares[:, None] + squares[None, :] - 2 * products)[pairs]) / 255
    return [round(float(value), 6) for value in np.quantile(distances, QUANTILES)]


def _clear(filesystem: pafs.FileSystem, folder: str) -> None:
    """Removes a data set, its record first."""
    selector = pafs.FileSelector(folder, allow_not_found=True)
    paths = [info.path for info in filesystem.get_file_info(selector)]
    for path in sorted(paths, key=lambda path: not path.endswith(INFO_FILE)):
        filesystem.delete_file(path)


def replace_atomically(new: str, path: str, old: str) -> None:
    """Puts the folder `new` in the place of `path`, whose content, if any, ends up in `old`."""
    replaces = os.path.exists(path)
    if replaces:
        os.rename(path, old)
    try:
        os.rename(new, path)
    except OSError:
        if replaces:
            os.rename(old, path)
        raise
