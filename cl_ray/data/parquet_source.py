"""Read the images of a source that is a folder of Parquet files.

Files are read through pyarrow's `ParquetFile`, in order and with page checksums. A cell holds an
image as pixels, as an encoded file, or as the name of a file.
"""

import contextlib
import json
import math
import posixpath
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NoReturn
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from cl_ray.data.conversion import Convert
from cl_ray.data.dataset import DatasetInfo
from cl_ray.data.decoding import BrokenImageError, ImageLimits, decode_image, decode_pixels
from cl_ray.data.file_tree import FileTree, Note
from cl_ray.data.labels import LabelValue, check_class_count, find_classes
from cl_ray.data.source_config import NO_LABELS, ChannelOrder, SourceConfig
from cl_ray.data.splits import find_file_splits
from cl_ray.data.writer import DatasetMetadata, RawImage, ReadImage, SourceSplits
from cl_ray.errors import UserError, first_error_line

_CHUNK = 256
"""Rows that are read at once, at most."""
_CHUNK_BYTES = 2**26
"""Bytes of cells that are read at once, unless one is larger."""
_HIVE_NULL = "__HIVE_DEFAULT_PARTITION__"
_IMAGE_TYPES = (
    "pixels (a tensor or lists of numbers), encoded image files or, in a column that is named, "
    "names of image files"
)


@dataclass(frozen=True)
class _PixelFormat:
    """How pixels that lie in cells as numbers are read.

    Args:
        flat_order: The order of flat cells of colour: [C, H, W] is `first`, [H, W, C] `last`; None
            refuses them.
        darkest: The float that stands for black, 0 or -1; 1 is white.
    """

    flat_order: ChannelOrder | None
    darkest: float


@dataclass(frozen=True)
class _ParquetFolder:
    """A folder with Parquet files.

    Args:
        tree: Its files.
        limits: Which images are refused.
        shape: Of the images in a dataset of this package's, which may be raw pixels; else None.
    """

    tree: FileTree
    limits: ImageLimits
    shape: tuple[int, int, int] | None = None

    @contextlib.contextmanager
    def open(self, file: str) -> Iterator[pq.ParquetFile]:
        """Open a file; report whatever goes wrong in reading it as one UserError."""
        try:
            with (
                self.tree.open(file) as stream,
                # With `pre_buffer` the whole file stays in memory until it is closed.
                pq.ParquetFile(
                    stream, page_checksum_verification=True, pre_buffer=False
                ) as parquet,
            ):
                yield parquet
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{self.tree.location}/{file} is damaged or cannot be read "
                f"({first_error_line(error)}): copy it again."
            ) from error

    def schema(self, file: str) -> pa.Schema:
        """Return the columns of a file, those in its folders' names included."""
        with self.open(file) as parquet:
            schema = parquet.schema_arrow
        for key, value in _partition_values(file, schema).items():
            schema = schema.append(pa.field(key, value.type))
        return schema

    def batches(self, file: str, *columns: str) -> Iterator[tuple[list[str], pa.RecordBatch]]:
        """Yield rows of a file with the names that error messages call them."""
        with self.open(file) as parquet:
            constants = _partition_values(file, parquet.schema_arrow)
            stored = [name for name in columns if name not in constants]
            row, rows = 0, self._batch_rows(parquet, columns, file)
            for batch in parquet.iter_batches(rows, columns=stored):
                names = [f"{self.tree.location}/{file}, row {row + k}," for k in range(len(batch))]
                row += len(batch)
                for key in set(columns).intersection(constants):
                    batch = batch.append_column(key, pa.repeat(constants[key], len(batch)))
                yield names, batch

    def _batch_rows(self, parquet: pq.ParquetFile, columns: Sequence[str], file: str) -> int:
        """Return how many rows are read at once: their images have about _CHUNK_BYTES."""
        largest, most_values = 1, 1
        for group in map(parquet.metadata.row_group, range(parquet.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.path_in_schema.split(".")[0] in columns:
                    rows = max(1, group.num_rows)
                    largest = max(largest, column.total_uncompressed_size // rows)
                    most_values = max(most_values, column.num_values // rows)
        if most_values > 3 * self.limits.pixels:
            self.limits.refuse(f"{most_values:,} values an image", f"{self.tree.location}/{file}")
        return max(1, min(_CHUNK, _CHUNK_BYTES // max(largest, 8 * most_values)))

    def labels(self, file: str, batch: pa.RecordBatch, label: str) -> list[LabelValue]:
        """Return the labels of rows as whole numbers, or as texts; null and NaN as None."""
        column = batch[label]
        kind = column.type
        if pa.types.is_dictionary(kind):
            column = column.dictionary_decode()
        try:
            if pa.types.is_floating(column.type):  # pandas makes them of whole numbers with gaps
                column = pc.if_else(pc.is_nan(column), None, column)
            column = column.cast(pa.int64() if _is_number(column.type) else pa.string())
        except pa.ArrowInvalid:  # a fraction
            _refuse_labels(f"{self.tree.location}/{file}", label, kind)
        values: list[LabelValue] = column.to_pylist()
        return values

    def cells(self, file: str, image: str) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the numbers in each cell of a file's image column, and the row's name."""
        for names, batch in self.batches(file, image):
            for k, name in enumerate(names):
                yield name, _cell_numbers(batch[image].slice(k, 1), name)

    def decode(
        self, cell: pa.Array, file: str, name: str, pixel_format: _PixelFormat
    ) -> Image.Image:
        """Return the image in a cell of a file, given as an array of length one."""
        if _value_type(cell.type):
            pixels = _to_uint8(_cell_numbers(cell, name), name, pixel_format)
            pixels = _shape_pixels(pixels, name, pixel_format.flat_order)
            self.limits.check(pixels.shape[1], pixels.shape[0], name)
            return Image.fromarray(pixels)
        value = cell[0].as_py()
        if isinstance(value, dict):
            value = value["bytes"] if value["bytes"] is not None else value.get("path")
        if value is None:
            raise UserError(f"{name} has no image: leave the row out.")
        if self.shape and pa.types.is_fixed_size_binary(cell.type):
            return Image.fromarray(decode_pixels(value, "raw", self.shape).squeeze())
        data = value if isinstance(value, bytes) else self._read_named(value, file, name)
        return decode_image(data, name, self.limits)

    def _read_named(self, image: str, file: str, name: str) -> bytes:
        """Read the image file that a row names, relative to its Parquet file or to the source."""
        folders = dict.fromkeys((posixpath.dirname(f"{self.tree.root}/{file}"), self.tree.root))
        paths = [posixpath.normpath(posixpath.join(folder, image)) for folder in folders]
        inside = [path for path in paths if path.startswith(f"{self.tree.root}/")]
        if not inside:  # a table from elsewhere copies no file that was not given
            raise UserError(
                f"{name} names the file {image}, which is not in {self.tree.location}: give a "
                "--source that holds it, or leave the row out."
            )
        for path in inside:
            try:
                with self.tree.open(path.removeprefix(f"{self.tree.root}/")) as stream:
                    self.limits.check_bytes(stream.seek(0, 2), name)
                    stream.seek(0)
                    return stream.read(self.limits.bytes + 1)
            except FileNotFoundError:
                continue
            except (OSError, ValueError) as error:
                raise UserError(
                    f"{name} names the file {image}, which cannot be read: "
                    f"{first_error_line(error)}."
                ) from error
        raise UserError(
            f"{name} names the file {image}, and there is none at {inside[0]}: paths are relative "
            "to the Parquet file, so put the files there, or leave the row out."
        )


def read_parquet_source(
    tree: FileTree,
    files: list[str],
    config: SourceConfig,
    convert: Convert,
    info: DatasetInfo | None,
    note: Note,
) -> SourceSplits:
    """Find the splits, columns and classes of sorted Parquet files; read their images lazily.

    `info` is the record of the folder, if it is a dataset of this package's.

    Raises:
        UserError: The splits or columns are ambiguous, or a column has an unsupported type.
    """
    folder = _ParquetFolder(tree, config.limits, info.shape if info else None)
    location = tree.location
    splits = find_file_splits(location, files, config.splits)
    if info and config.splits == "auto":
        splits = {s: [shard.file for shard in split.shards] for s, split in info.splits.items()}
    first = splits["train"][0]
    schemas = {file: folder.schema(file) for files in splits.values() for file in files}
    image, label = _find_columns(
        schemas[first], f"{location}/{first}", config.image_column, config.label_column
    )
    for file, schema in schemas.items():
        _find_columns(schema, f"{location}/{file}", image, label or NO_LABELS)
    if config.label_column is None and label is None:
        _note_label_candidates(folder, schemas, image, note)
    classes, class_indices = None, dict[LabelValue, int]()
    if label:
        known = info.classes if info else _hugging_face_names(schemas[first], label)
        values = _distinct_labels(folder, schemas, label)
        classes, class_indices = find_classes(
            values, f"the column {label}", note, known, is_numbered=info is not None
        )
    darkest = _find_darkest(folder, schemas, image, note)
    pixel_format = _PixelFormat(config.channels, darkest)
    known_columns = ("id", *["origin"] * info.origins) if info else ()
    columns = [name for name in (image, label, *known_columns) if name]

    def images(files: list[str]) -> Iterator[ReadImage]:
        for file in files:
            for names, batch in folder.batches(file, *columns):
                labels = folder.labels(file, batch, label) if label else [None] * len(batch)
                indices = batch["id"].to_pylist() if info else [None] * len(batch)
                origins = _origins(batch, image, [n.removeprefix(f"{location}/") for n in names])
                for k, name in enumerate(names):
                    try:
                        decoded = folder.decode(batch[image].slice(k, 1), file, name, pixel_format)
                        pixels, label_index = convert(decoded, name), class_indices.get(labels[k])
                        yield RawImage(pixels, label_index, name, indices[k], origins[k])
                    except BrokenImageError as error:
                        yield error

    return (
        {split: images(files) for split, files in splits.items()},
        DatasetMetadata(
            name=location,
            source=info.source if info else location,
            licence=info.licence if info else None,
            classes=classes,
        ),
    )


def _origins(batch: pa.RecordBatch, image: str, names: list[str]) -> list[str]:
    """Return where rows are from: as recorded, by the path in the image's cell, or by name."""
    if "origin" in batch.schema.names:
        return list(batch["origin"].to_pylist())
    cells = batch[image]
    if pa.types.is_struct(cells.type) and cells.type.get_field_index("path") >= 0:
        cells = cells.field("path")
    paths = cells.to_pylist() if _is_text(cells.type) else [None] * len(names)
    return [path or name.rstrip(",") for path, name in zip(paths, names, strict=True)]


def _find_columns(
    schema: pa.Schema, file: str, image: str | None, label: str | None
) -> tuple[str, str | None]:
    """Return the names of the image and the label column, after checking their types."""
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if image is None:
        usual = [name for name in ("image", "img") if name in schema.names]
        fitting = [field.name for field in schema if _is_surely_image(field.type)] or [
            field.name for field in schema if _value_type(field.type)
        ]
        if not usual and len(fitting) != 1:
            raise UserError(
                f"{file} has {len(fitting) or 'no'} columns that can be images ({_IMAGE_TYPES}): "
                f"name one with `--image-column`; it has {columns}."
            )
        image = (usual or fitting)[0]
    for name in (image, label):
        if name not in (None, NO_LABELS, *schema.names):
            raise UserError(f"{file} has no column {name}: it has {columns}.")
    kind = schema.field(image).type
    is_raw = pa.types.is_fixed_size_binary(kind)  # in a dataset of this package's
    if not (is_raw or _is_surely_image(kind) or _value_type(kind) or _is_text(kind)):
        raise UserError(
            f"{file} holds {kind} in its column {image}: convert it to {_IMAGE_TYPES}, or name "
            "another with `--image-column`."
        )
    label = label or ("label" if "label" in schema.names else NO_LABELS)
    if label == NO_LABELS:
        return image, None
    if not _is_label(schema.field(label).type):
        _refuse_labels(file, label, schema.field(label).type)
    return image, label


def _refuse_labels(file: str, label: str, kind: pa.DataType) -> NoReturn:
    raise UserError(
        f"{file} holds {kind} in its column {label}, and a class is a whole number or a name: name "
        "another with `--label-column`, or `none`."
    )


def _partition_values(file: str, schema: pa.Schema) -> dict[str, pa.Scalar]:
    """Return what the names of a file's folders hold beside its columns, as Hive: `label=0`."""
    parts = (part.split("=", 1) for part in file.split("/")[:-1] if "=" in part)
    texts = {unquote(key): unquote(value) for key, value in parts}
    return {
        key: pa.scalar(int(text), pa.int64())
        if re.fullmatch(r"-?\d{1,18}", text)
        else pa.scalar(None if text == _HIVE_NULL else text, pa.string())
        for key, text in texts.items()
        if key not in schema.names
    }


def _note_label_candidates(
    folder: _ParquetFolder, schemas: dict[str, pa.Schema], image: str, note: Note
) -> None:
    """Name the columns that hold few different values in the first rows of every file."""
    first = next(iter(schemas.values()))
    found: dict[str, list[LabelValue]] = {
        field.name: []
        for field in first
        if field.name not in (image, "split")
        and _is_label(field.type)
        and not pa.types.is_floating(field.type)
    }
    for file, schema in schemas.items() if found else ():
        for _, batch in islice(folder.batches(file, *set(found).intersection(schema.names)), 1):
            for name in batch.schema.names:
                found[name] += folder.labels(file, batch, name)
    few = [name for name, values in found.items() if 2 <= len(set(values)) <= len(values) / 2]
    if few:
        one = len(few) == 1
        note(
            f"No labels are read: the column{'' if one else 's'} {', '.join(few)} could be "
            f"{'one' if one else 'some'}; add `--label-column {few[0]}`."
        )


def _distinct_labels(
    folder: _ParquetFolder, schemas: dict[str, pa.Schema], label: str
) -> set[LabelValue]:
    """Return all different values of the label column, both of true and false if it has these."""
    values = set[LabelValue]()
    for file, schema in schemas.items():
        for _, batch in folder.batches(file, label):
            values.update(folder.labels(file, batch, label))
            check_class_count(len(values), folder.tree.location, f"its column {label}")
        if pa.types.is_boolean(schema.field(label).type):
            values |= {"false", "true"}
    return values


def _is_label(kind: pa.DataType) -> bool:
    """Whether a column can hold classes; of floats, those that are whole numbers."""
    kind = _decoded(kind)
    return _is_number(kind) or pa.types.is_boolean(kind) or _is_text(kind)


def _is_text(kind: pa.DataType) -> bool:
    return _decoded(kind) in (pa.string(), pa.large_string())


def _decoded(kind: pa.DataType) -> pa.DataType:
    """Return the type of the values in a dictionary, and other types as they are."""
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_integer(kind) or pa.types.is_floating(kind)


def _is_surely_image(kind: pa.DataType) -> bool:
    """Whether a column holds uint8 pixels of one shape or image files, or nothing else does."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type  # null where all cells have a path instead
    of_one_shape = isinstance(kind, pa.FixedShapeTensorType) or pa.types.is_fixed_size_list(kind)
    return kind in (pa.binary(), pa.large_binary(), pa.null()) or (
        of_one_shape and _value_type(kind) == pa.uint8()
    )


def _is_list(kind: pa.DataType) -> bool:
    return (
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _value_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type of the numbers in a tensor or in lists (of lists); None for other types."""
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation not in (None, list(range(len(kind.shape)))):
            return None
        kind = kind.storage_type
    if not _is_list(kind):
        return None
    while _is_list(kind):
        kind = kind.value_type
    return kind if _is_number(kind) else None


def _cell_numbers(cell: pa.Array, name: str) -> NDArray[Any]:
    """Return the numbers in an array of one cell, in the shape of its lists."""
    if cell.null_count:
        raise UserError(f"{name} has no image: leave the row out.")
    shape = list(cell.type.shape) if isinstance(cell.type, pa.FixedShapeTensorType) else []
    values = cell.storage if isinstance(cell, pa.ExtensionArray) else cell
    lengths = []
    while _is_list(values.type) and not values.null_count:
        if pa.types.is_fixed_size_list(values.type):
            sizes = [values.type.list_size]
        else:
            sizes = pc.unique(pc.list_value_length(values)).to_pylist()
        if len(sizes) != 1 or not sizes[0]:
            raise UserError(f"{name} is not one image: its lists are empty or differ in length.")
        lengths.append(sizes[0])
        values = values.flatten()
    if values.null_count:
        raise UserError(f"{name} has a pixel missing: leave the row out.")
    numbers: NDArray[Any] = values.to_numpy().reshape(shape or lengths)
    return numbers


def _to_uint8(numbers: NDArray[Any], name: str, pixel_format: _PixelFormat) -> NDArray[np.uint8]:
    """Scale floats to 0 to 255; check that whole numbers are in that range."""
    if numbers.dtype.kind == "f":
        scale = 255 / (1 - pixel_format.darkest)
        return np.rint((numbers.astype(np.float64) - pixel_format.darkest) * scale).astype(np.uint8)
    if numbers.dtype != np.uint8 and (numbers.min() < 0 or numbers.max() > 255):
        raise UserError(
            f"{name} holds numbers from {numbers.min()} to {numbers.max()}, and whole numbers are "
            "pixels from 0 to 255: scale them to that range first."
        )
    return numbers.astype(np.uint8)


def _shape_pixels(
    pixels: NDArray[np.uint8], name: str, flat_order: ChannelOrder | None
) -> NDArray[np.uint8]:
    """Return pixels [H, W], [H, W, C], [C, H, W] or the flat ones of a square as [H, W(, 3)]."""
    if pixels.ndim == 1:
        channels = 3 if 3 * math.isqrt(len(pixels) // 3) ** 2 == len(pixels) else 1
        side = math.isqrt(len(pixels) // channels)
        if side * side * channels != len(pixels):
            raise UserError(
                f"{name} holds {len(pixels)} numbers, which are the pixels of no square, grey or "
                "RGB: store images as lists of their rows."
            )
        if channels == 3 and flat_order is None:
            raise UserError(
                f"{name} holds a colour image as a flat list: add `--channels first` (all of red, "
                "then green, then blue) or `--channels last` (red, green and blue of each pixel)."
            )
        first = flat_order == "first"
        pixels = pixels.reshape((channels, side, side) if first else (side, side, channels))
        if first:
            pixels = pixels.transpose(1, 2, 0)
    elif pixels.ndim == 3 and pixels.shape[2] not in (1, 3) and pixels.shape[0] in (1, 3):
        pixels = pixels.transpose(1, 2, 0)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3):
        return np.ascontiguousarray(pixels)
    raise UserError(
        f"{name} holds numbers of shape {' × '.join(map(str, pixels.shape))}, and an image is "
        "H × W, H × W × C or C × H × W with 1 or 3 channels: convert it."
    )


def _find_darkest(
    folder: _ParquetFolder, schemas: dict[str, pa.Schema], image: str, note: Note
) -> float:
    """Return the float that stands for black in all files, 0 or -1; note the range."""
    kinds = {file: _value_type(schema.field(image).type) for file, schema in schemas.items()}
    floats = [file for file, kind in kinds.items() if kind and pa.types.is_floating(kind)]
    darkest = 0.0
    for file in floats:
        for name, numbers in folder.cells(file, image):
            low, high = float(numbers.min()), float(numbers.max())
            if not (low >= -1 and high <= 1):
                raise UserError(
                    f"{name} holds floats from {low:g} to {high:g}, and floats are pixels from 0 "
                    "to 1 or from -1 to 1: scale them to one of these first."
                )
            darkest = -1.0 if low < 0 else darkest
    if floats:
        note(f"Floats from {darkest:g} to 1 are scaled to pixels from 0 to 255.")
    return darkest


def _hugging_face_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Return the class names that Hugging Face's `datasets` stores in a file's metadata."""
    try:
        record: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = record["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return names
