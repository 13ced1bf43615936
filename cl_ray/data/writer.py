"""Write images as a folder of Parquet shards and `dataset.json`, completely or not at all.

The images of a split are first spooled, as they will be stored and in the source's order, to one
file on disk, and written from there in a random order. So the rows of every source are well
shuffled, and memory holds some numbers of each image but no image.
"""

import hashlib
import io
import math
import os
import re
import shutil
import struct
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray

from cl_ray.data.dataset import (
    INFO_FILE,
    PACKAGED,
    QUANTILES,
    UNLABELLED,
    DatasetInfo,
    ShardInfo,
    SplitInfo,
    counts_by_label,
    distance_stride,
)
from cl_ray.data.decoding import (
    ADD_SIZE,
    JPEG_QUALITY,
    MAX_SIDE,
    MIN_SIDE,
    BrokenImageError,
    Encoding,
    decode_pixels,
    encode_pixels,
)
from cl_ray.data.file_tree import Note, listed
from cl_ray.data.splits import SPLIT_NAMES
from cl_ray.errors import UserError, first_error_line, pluralize, printable
from cl_ray.storage import open_filesystem, sync
from cl_ray.uri import public_uri

VALIDATION_FRACTION, MIN_HELD_OUT = 0.1, 10
"""What is held out by default to choose settings and checkpoints by."""
GROUP_BYTES = 2**20
"""Pixels of a row group."""
GROUPS_PER_SHARD = 16
"""Row groups of a file of raw pixels, at most."""
SHARD_BYTES = 160_000_000
"""About the size of a file of encoded images. The footer of a larger one, with 270 bytes of each
row group, would take more than the 64 kB that are read of it at first."""
RAW_SIDE = 64
"""Larger images are stored as PNG by default."""
SKIPPED_FILE = "skipped.txt"
"""Lists beside the data the images that were left out as broken."""

_DISTANCE_SAMPLE = 1024
"""Rows whose pairwise distances are computed."""
_SPOOL_BUFFER = 2**20
"""Bytes of images that are written to disk at once: a call for each takes twice the time."""
_REPORT_INTERVAL = 1000
"""Images between two calls of the progress callback."""
_SHARD_FILE = re.compile(r"[a-z]+-\d{5}-of-\d{5}\.parquet")

_LENGTH = struct.Struct("<I")
_T = TypeVar("_T")

ProgressCallback = Callable[[str, int, int | None], None]
"""Called with the stage, the images done, and their total (None: unknown)."""


@dataclass(frozen=True)
class RawImage:
    """One image of a source.

    Args:
        image: [H, W, C] uint8.
        label: Its class, from 0 up; None if it has none.
        name: What error messages call it.
        index: Its position in the source's order; None is after the previous one.
        origin: Where in the source it is from, such as a file's path in it; None if unknown. It
            is written without what may be secret in a URI.
    """

    image: NDArray[np.uint8]
    label: int | None
    name: str
    index: int | None = None
    origin: str | None = None


@dataclass(frozen=True)
class DatasetMetadata:
    """The fields of `dataset.json` that do not follow from the images."""

    name: str
    source: str
    licence: str | None = None
    classes: list[str] | None = None
    predicted_labels: str = ""


ReadImage = RawImage | BrokenImageError
SourceSplits = tuple[dict[str, Iterable[ReadImage]], DatasetMetadata]
"""The images of each split, read lazily, and their metadata.

With `--scale-depth` the reader is called twice, and both results are read.
"""


@dataclass(frozen=True)
class _SpooledSplit:
    """The images of a split on disk, and the indices of those that it has, in order.

    Args:
        file: Holds of each of m images its origin's length and UTF-8, and the image as it is
            stored.
        ends: [m + 1] int64, where each of these records ends in the file, from 0 on.
        shape: Height, width and channels.
        encoding: How images are stored.
        label: [m] int64, UNLABELLED where an image has none; empty if none of the data has one.
        rows: [n] indices into the m images.
        id: [n] int64, each row's place in the source's order.
        has_origin: Whether any of the m images has an origin.
    """

    file: str
    ends: NDArray[np.int64]
    shape: tuple[int, int, int]
    encoding: Encoding
    label: NDArray[np.int64]
    rows: NDArray[np.intp]
    id: NDArray[np.int64]
    has_origin: bool

    @property
    def row_labels(self) -> NDArray[np.int64]:
        """[n], or empty as `label` is."""
        return self.label[self.rows] if self.label.size else self.label

    def records(self, order: NDArray[np.intp]) -> Iterator[tuple[bytes, bytes]]:
        """Yield the origin and the stored image of rows; a mapped file would stay in memory."""
        with open(self.file, "rb", buffering=0) as stream:
            for index in self.rows[order].tolist():
                start, stop = int(self.ends[index]), int(self.ends[index + 1])
                stream.seek(start)
                record = stream.read(stop - start)
                (length,) = _LENGTH.unpack_from(record)
                data = _LENGTH.size + length
                yield record[_LENGTH.size : data], record[data:]


class _HashedStream(io.RawIOBase):
    """Counts and hashes what is written to a stream."""

    def __init__(self, stream: pa.NativeFile):
        self.stream, self.size, self.sha256 = stream, 0, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.stream.write(data)
        self.sha256.update(data)
        self.size += len(data)
        return len(data)

    def tell(self) -> int:
        return self.size


def write_splits(
    splits: Mapping[str, Iterable[ReadImage]],
    out: str,
    metadata: DatasetMetadata,
    *,
    validation_fraction: float | None = 0.0,
    test_fraction: float = 0.0,
    seed: int = 0,
    overwrite: bool = False,
    skip_broken: bool = False,
    keep_ids: bool = False,
    encoding: Encoding | None = None,
    quality: int = JPEG_QUALITY,
    level: int = 1,
    progress: ProgressCallback | None = None,
    note: Note = print,
) -> DatasetInfo:
    """Write a dataset.

    A local folder appears in one rename. On another filesystem `dataset.json` is written last, so
    that an incomplete folder is never taken for a dataset.

    Args:
        splits: The images of `train`, and of `validation` and `test` if there are such; all of one
            shape. Some may have no label.
        out: A folder or the URI of one.
        metadata: The rest of `dataset.json`.
        validation_fraction: Fraction of `train`, in [0, 1), that becomes the split `validation`:
            drawn at random, of every class alike. None is VALIDATION_FRACTION, unless there is
            such a split or less than MIN_HELD_OUT images would be in it.
        test_fraction: The same for the split `test`.
        seed: Determines the order of the rows, those held out and the sample for the distances.
        overwrite: Replace the dataset that is at `out`.
        skip_broken: Leave broken images out, and list them in SKIPPED_FILE.
        keep_ids: Give each row its `RawImage.index` as id, not its place in the order of these.
        encoding: How images are stored; None is raw pixels up to RAW_SIDE, and PNG above.
        quality: Of JPEG, 1 to 100.
        level: Of zstd compression, 1 to 22.
        progress: See `ProgressCallback`.
        note: Called with a sentence on what is left out.

    Raises:
        UserError: `out` exists or cannot be written, or the images do not fit together.
    """
    check_output_free(out, overwrite)
    fractions = {"test": test_fraction, "validation": validation_fraction}
    if "validation" in splits and validation_fraction is None:
        fractions["validation"] = 0.0
    for split, fraction in fractions.items():
        if fraction and split in splits:
            raise UserError(
                f"The source has a {split} split of its own: leave --{split}-fraction out."
            )
    filesystem, path = open_filesystem(out)
    local = isinstance(filesystem, pafs.LocalFileSystem)
    parent, name = os.path.split(path)
    report = progress or (lambda stage, done, total: None)
    written = out
    try:
        if local:
            os.makedirs(parent, exist_ok=True)
        else:
            written = f"The temporary folder {gettempdir()} (TMPDIR names another)"
        # Beside a local `out`, so on the same disk; hidden, so that no source reads it as data.
        with TemporaryDirectory(prefix=f".{name}-", dir=parent if local else None) as work:
            stored = encoding, quality
            parts, broken = _spool(
                splits, work, metadata.classes, skip_broken, keep_ids, stored, report
            )
            written = out
            random = np.random.default_rng(seed)
            parts = _in_order(parts | _hold_out(parts["train"], fractions, random))
            _note_missing_classes(parts, metadata.classes, note)
            is_labelled = bool(parts["train"].label.size)
            if local:
                folder = os.path.join(work, "new")
            else:
                folder = path
                _clear(filesystem, folder)
            filesystem.create_dir(folder)
            shape = parts["train"].shape
            row_group = min(max(GROUP_BYTES // int(np.prod(shape)), 64), 1024)
            info = DatasetInfo(
                **vars(metadata if is_labelled else replace(metadata, classes=None)),
                shape=shape,
                encoding=parts["train"].encoding,
                labelled=is_labelled,
                origins=parts["train"].has_origin,
                row_group=row_group,
                splits={
                    split: SplitInfo(
                        rows=len(part.rows),
                        unlabelled=int((part.row_labels == UNLABELLED).sum()),
                        label_counts=counts_by_label(part.row_labels) if is_labelled else None,
                        shards=_write_shards(
                            part, split, filesystem, folder, row_group, level, random, report
                        ),
                        distances=_distances(part, random),
                    )
                    for split, part in parts.items()
                },
            )
            if broken:
                lines = [f"{printable(e.name)}: {printable(e.reason)}\n" for e in broken]
                with filesystem.open_output_stream(f"{folder}/{SKIPPED_FILE}") as stream:
                    stream.write("".join(lines).encode())
                images = pluralize(len(broken), "broken image")
                note(f"Left out: {images}, listed in {out}/{SKIPPED_FILE}.")
            with filesystem.open_output_stream(f"{folder}/{INFO_FILE}") as stream:
                stream.write((info.model_dump_json(indent=1) + "\n").encode())
            if local:
                replace_atomically(folder, path, os.path.join(work, "old"))
    except OSError as error:
        raise UserError(f"{written} cannot be written: {first_error_line(error)}.") from error
    return info


def check_output_free(out: str, overwrite: bool) -> None:
    """Check that a dataset may be written to `out`.

    Raises:
        UserError: Something is there, unless it is a (complete or incomplete) dataset and
            `overwrite` is set.
    """
    if out == PACKAGED:
        raise UserError(f"{out} names the packaged dataset: write to ./{out} or another --out.")
    filesystem, path = open_filesystem(out)
    try:
        kind = filesystem.get_file_info(path).type
        if kind == pafs.FileType.NotFound:
            return
        if kind == pafs.FileType.File:
            raise UserError(f"{out} is a file: give a folder as --out.")
        names = [info.base_name for info in filesystem.get_file_info(pafs.FileSelector(path))]
    except OSError as error:
        raise UserError(f"{out} cannot be read: {first_error_line(error)}.") from error
    if not names:
        return
    own = (INFO_FILE, SKIPPED_FILE)
    foreign = [name for name in names if name not in own and not _SHARD_FILE.fullmatch(name)]
    if foreign:
        raise UserError(
            f"{out} holds {foreign[0]}, which is no part of a dataset: give another --out."
        )
    if not overwrite:
        raise UserError(f"{out} exists already: give another --out, or --overwrite to replace it.")


def _spool(
    splits: Mapping[str, Iterable[ReadImage]],
    work: str,
    classes: list[str] | None,
    skip_broken: bool,
    keep_ids: bool,
    stored: tuple[Encoding | None, int],
    report: ProgressCallback,
) -> tuple[dict[str, _SpooledSplit], list[BrokenImageError]]:
    """Copy all images to files in the folder `work`; check that they fit together.

    Returns:
        The splits, and the errors of broken images.
    """
    first: RawImage | None = None
    (encoding, quality), parts, broken = stored, {}, list[BrokenImageError]()
    for split in _in_order(splits):
        labels, indices, ends = array("q"), array("q"), array("q", [0])
        file, has_origin = os.path.join(work, f"{split}.spool"), False
        with open(file, "wb", buffering=_SPOOL_BUFFER) as stream:
            for raw in splits[split]:
                if isinstance(raw, BrokenImageError):
                    raw.__traceback__ = raw.__cause__ = raw.__context__ = None  # hold its bytes
                    broken.append(raw)
                    continue
                first = first or raw
                _check_image(raw, first, classes)
                encoding = encoding or ("raw" if raw.image.shape[0] <= RAW_SIDE else "png")
                origin = public_uri(raw.origin or "").encode(errors="backslashreplace")
                has_origin = has_origin or bool(origin)
                data = encode_pixels(raw.image, encoding, quality)
                record = b"".join([_LENGTH.pack(len(origin)), origin, data])
                ends.append(ends[-1] + stream.write(record))
                labels.append(UNLABELLED if raw.label is None else raw.label)
                indices.append(len(indices) if raw.index is None else raw.index)
                if len(indices) % _REPORT_INTERVAL == 0:
                    report(f"reading {split}", len(indices), None)
        if first is None or not indices or encoding is None:
            if broken and not skip_broken:
                continue
            raise UserError(f"There is no image in the split {split}: give another --source.")
        report(f"reading {split}", len(indices), len(indices))
        height, width, channels = first.image.shape
        ids = np.sort(np.frombuffer(indices, np.int64)) if keep_ids else np.arange(len(indices))
        parts[split] = _SpooledSplit(
            file,
            np.frombuffer(ends, np.int64),
            (height, width, channels),
            encoding,
            np.frombuffer(labels, np.int64),
            np.argsort(np.frombuffer(indices, np.int64), kind="stable"),
            ids,
            has_origin,
        )
    if not any((part.label != UNLABELLED).any() for part in parts.values()):
        parts = {split: replace(part, label=part.label[:0]) for split, part in parts.items()}
    if broken and not skip_broken:
        _refuse_broken(broken, sum(len(part.rows) for part in parts.values()))
    return parts, broken


def _refuse_broken(broken: list[BrokenImageError], whole: int) -> None:
    """Raise an error that names the broken images; `whole` is the number of the others."""
    if len(broken) == 1:
        raise UserError(f"{str(broken[0])[:-1]}, or leave it out with `--skip-broken`.")
    names: dict[str, list[str]] = {}
    for error in broken:
        names.setdefault(error.reason, []).append(error.name)
    found = "; ".join(f"{listed(images, 100)} ({reason})" for reason, images in names.items())
    count = f"{len(broken):,} of {whole + len(broken):,} images cannot be read"
    raise UserError(
        f"{count}: {found}; repair or remove them, or leave them out with `--skip-broken`."
    )


def _in_order(splits: Mapping[str, _T]) -> dict[str, _T]:
    """Return the splits as they are written: train, validation, test."""
    return {split: splits[split] for split in sorted(splits, key=list(SPLIT_NAMES).index)}


def _check_image(raw: RawImage, first: RawImage, classes: list[str] | None) -> None:
    """Check an image's shape, alone and against the first image's, and its label."""
    (height, width, channels), (high, wide, other) = raw.image.shape, first.image.shape
    size = f"{width} × {height}"
    if (height, width) != (high, wide):
        raise UserError(f"{raw.name} is {size} and {first.name} is {wide} × {high}: {ADD_SIZE}.")
    if height != width:
        raise UserError(f"{raw.name} is not square but {size}: {ADD_SIZE}.")
    if not MIN_SIDE <= height <= MAX_SIDE:
        raise UserError(
            f"{raw.name} is {size}, and sides are {MIN_SIDE} to {MAX_SIDE}: {ADD_SIZE}."
        )
    if channels != other:
        kinds = {1: "grey", 3: "in colour"}
        raise UserError(
            f"{raw.name} is {kinds[channels]} and {first.name} is {kinds[other]}: add "
            "`--color grey` or `--color rgb`."
        )
    known = f", but classes are 0 to {len(classes) - 1}" if classes else ""
    if raw.label is not None and (raw.label < 0 or (classes and raw.label >= len(classes))):
        raise UserError(
            f"{raw.name} has the label {raw.label}{known}: leave the labels out with "
            "`--label-column none`."
        )


def _hold_out(
    train: _SpooledSplit, fractions: Mapping[str, float | None], random: np.random.Generator
) -> dict[str, _SpooledSplit]:
    """Divide the source's `train` into what stays of it and the splits that are held out."""
    count = len(train.rows)
    sizes = {split: round(count * part) for split, part in fractions.items() if part}
    for split, size in sizes.items():
        if size == 0 or sum(sizes.values()) >= count:
            raise UserError(
                f"--{split}-fraction {fractions[split]:g} of {pluralize(count, 'image')} leaves a "
                "split empty: choose another."
            )
    default = round(count * VALIDATION_FRACTION)
    has_room = sum(sizes.values()) + default < count
    if None in fractions.values() and default >= MIN_HELD_OUT and has_room:
        sizes["validation"] = default
    parts, left = {}, np.arange(count)
    for split, size in sizes.items():
        held_out = np.zeros(len(left), bool)
        labels = train.label[train.rows[left]] if train.label.size else np.zeros(len(left))
        held_out[_stratified_sample(labels, size, random)] = True
        parts[split], left = left[held_out], left[~held_out]
    return {
        split: replace(train, rows=train.rows[rows], id=train.id[rows])
        for split, rows in {"train": left, **parts}.items()
    }


def _note_missing_classes(
    parts: Mapping[str, _SpooledSplit], classes: list[str] | None, note: Note
) -> None:
    """Name the classes that are not in every split, with the number of their images in all."""
    labels = {split: part.row_labels for split, part in parts.items()}
    numbers, counts = np.unique(np.concatenate(list(labels.values())), return_counts=True)
    for split, found in labels.items():
        present = set(np.unique(found).tolist())
        names = [
            f"{classes[number] if classes else number} ({pluralize(count, 'image')})"
            for number, count in zip(numbers, counts, strict=True)
            if number >= 0 and number not in present
        ]
        if names:
            of = "class" if len(names) == 1 else f"{len(names):,} classes"
            note(f"The split {split} has no image of the {of} {listed(names)}.")


def _stratified_sample(
    labels: NDArray[Any], count: int, random: np.random.Generator
) -> NDArray[np.intp]:
    """Draw `count` indices of labels [n], of every class its fraction up to one."""
    shuffled = random.permutation(len(labels))
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]
    return by_class[((np.arange(count) + random.random()) * len(labels) / count).astype(np.intp)]


def _write_shards(
    part: _SpooledSplit,
    split: str,
    filesystem: pafs.FileSystem,
    folder: str,
    row_group: int,
    level: int,
    random: np.random.Generator,
    report: ProgressCallback,
) -> list[ShardInfo]:
    """Write the Parquet files of a split, rows in random order."""
    count = len(part.rows)
    shuffled = random.permutation(count)
    groups = -(-count // row_group)
    files = -(-groups // GROUPS_PER_SHARD)
    if part.encoding != "raw":
        stored = int(part.ends[-1]) * count // (len(part.ends) - 1)
        files = min(groups, max(1, round(stored / SHARD_BYTES)))
    shards = []
    for number in range(files):
        # Whole row groups a file, so that only the last one of the split is short.
        start, stop = (row_group * (groups * k // files) for k in (number, number + 1))
        order = shuffled[start:stop]
        name = f"{split}-{number:05d}-of-{files:05d}.parquet"
        with filesystem.open_output_stream(f"{folder}/{name}") as stream:
            hashed = _HashedStream(stream)
            _write_parquet(part, order, hashed, row_group, level)
        digest = hashed.sha256.hexdigest()
        shards.append(ShardInfo(file=name, rows=len(order), bytes=hashed.size, sha256=digest))
        report(f"writing {split}", start + len(order), count)
    return shards


def _write_parquet(
    part: _SpooledSplit, order: NDArray[np.intp], sink: _HashedStream, row_group: int, level: int
) -> None:
    """Write rows as one Parquet file, a row group at a time."""
    raw, label = part.encoding == "raw", part.label[:0]
    # Parquet has no 8-bit integers: pixels in a list or a tensor would take four bytes each before
    # they are compressed, and six times as long to write and to read.
    image = pa.binary(math.prod(part.shape) if raw else -1)
    fields = [pa.field("id", pa.int64(), False), pa.field("image", image, False)]
    if part.label.size:
        label = part.label[part.rows[order]]
        fields.append(pa.field("label", pa.int64(), bool((label == UNLABELLED).any())))
    if part.has_origin:
        fields.append(pa.field("origin", pa.string(), False))
    compressed = [field.name for field in fields if raw or field.name != "image"]
    with pq.ParquetWriter(
        sink,
        pa.schema(fields),
        compression={"image": "none", **dict.fromkeys(compressed, "zstd")},
        compression_level=dict.fromkeys(compressed, level),
        use_dictionary=False,
        data_page_size=8 * GROUP_BYTES,
        write_statistics=["label"],
        write_page_checksum=True,
    ) as writer:
        for start in range(0, len(order), row_group):
            rows = slice(start, start + row_group)
            origins, images = zip(*part.records(order[rows]), strict=True)
            columns = {
                "id": _int_array(part.id[order[rows]]),
                "image": _byte_array(images, image),
                "origin": _byte_array(origins, pa.string()),
            }
            if part.label.size:
                columns["label"] = _int_array(label[rows], label[rows] != UNLABELLED)
            arrays = [columns[field.name] for field in fields]
            writer.write_batch(pa.record_batch(arrays, schema=pa.schema(fields)), row_group)


def _int_array(values: NDArray[np.int64], known: NDArray[np.bool_] | None = None) -> pa.Array:
    """Return an Arrow array, null where not known; `pa.array` would import pandas."""
    bits = None if known is None else pa.py_buffer(np.packbits(known, bitorder="little"))
    values = np.ascontiguousarray(values)
    return pa.Array.from_buffers(pa.int64(), len(values), [bits, pa.py_buffer(values)])


def _byte_array(values: Sequence[bytes], kind: pa.DataType) -> pa.Array:
    """Return an Arrow array of binary or of strings; `pa.array` would import pandas."""
    buffers = [None, pa.py_buffer(b"".join(values))]
    if not pa.types.is_fixed_size_binary(kind):
        buffers.insert(1, pa.py_buffer(np.cumsum([0, *map(len, values)], dtype=np.int32)))
    return pa.Array.from_buffers(kind, len(values), buffers)


def _distances(part: _SpooledSplit, random: np.random.Generator) -> list[float]:
    """Return the quantiles of the distance between two rows, from a sample of them."""
    count = min(len(part.rows), _DISTANCE_SAMPLE)
    if count < 2:
        return []
    rows = np.sort(random.choice(len(part.rows), count, replace=False))
    stride = distance_stride(part.shape[0])
    images = (decode_pixels(data, part.encoding, part.shape) for _, data in part.records(rows))
    pixels = np.array([image[::stride, ::stride].ravel() for image in images])
    pixels = (pixels ^ 128).view(np.int8)  # less 128, at a byte each
    products = np.zeros((count, count))
    for start in range(0, pixels.shape[1], 1024):
        # Integers, which are at most 1024 · 2**14 in a block and below 2**53 in all, so exact:
        # near duplicates keep their distance, and the result does not depend on the order of
        # summation in a library.
        block = pixels[:, start : start + 1024].astype(np.float32)
        products += block @ block.T
    squares = np.diagonal(products)
    flat = np.concatenate(
        [squares[k] + squares[k + 1 :] - 2 * products[k, k + 1 :] for k in range(count - 1)]
    )
    distances = np.sqrt(flat) / 255
    return [round(float(value), 6) for value in np.quantile(distances, QUANTILES)]


def _clear(filesystem: pafs.FileSystem, folder: str) -> None:
    """Remove a dataset, its record first."""
    selector = pafs.FileSelector(folder, allow_not_found=True)
    paths = [info.path for info in filesystem.get_file_info(selector)]
    for path in sorted(paths, key=lambda path: not path.endswith(INFO_FILE)):
        filesystem.delete_file(path)


def replace_atomically(new: str, path: str, old: str) -> None:
    """Move the folder `new` to `path`; move what was there, if anything, to `old`.

    An error or an interrupt leaves the old folder or the new one at `path`. A power cut or a kill
    between the two moves leaves nothing there, and both folders, whole, at `old` and `new`. A mount
    point, such as a container's volume, cannot be moved: its files are replaced one by one.
    """
    for part in (*Path(new).rglob("*"), Path(new)):
        sync(part)
    if os.path.ismount(path):
        for name in os.listdir(path):
            os.unlink(os.path.join(path, name))
        shutil.copytree(new, path, dirs_exist_ok=True)
        return
    try:
        if os.path.exists(path):
            os.rename(path, old)
        os.rename(new, path)
    except BaseException:
        if os.path.exists(old) and not os.path.exists(path):
            os.rename(old, path)
        raise
    sync(Path(path).parent)
