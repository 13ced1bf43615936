"""Parquet files of images → pictures."""

import json
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from PIL import Image

from cl_ray.data.dataset import DatasetInfo, first_error_line, without_secrets
from cl_ray.data.image_ops import Convert, decode
from cl_ray.data.writer import SPLIT_NAMES, DatasetMetadata, RawImage, SourceSplits
from cl_ray.errors import UserError

NO_LABELS = "none"
AT_A_TIME = 256
SPLIT = re.compile(rf"({'|'.join(SPLIT_NAMES)})(?![a-z])")
FORMS = "uint8 pixels of one shape (a tensor or fixed-size list) or encoded image files"


def read_parquet_source(
    location: str,
    filesystem: pafs.FileSystem,
    path: str,
    files: list[str],
    convert: Convert,
    image_column: str | None = None,
    label_column: str | None = None,
    info: DatasetInfo | None = None,
) -> SourceSplits:
    """Finds splits, columns and classes in Parquet files; reads no image yet.

    Args:
        location: what the user called the folder.
        filesystem: where it is.
        path: where on that filesystem.
        files: the Parquet files in it, relative to it and sorted.
        convert: makes pixels of an image.
        image_column: None is the column `image` or `img`, or else the only one that can be meant.
        label_column: None is the column `label`, if there is one; `none` is no labels.
        info: the record of the folder, if it is a data set of this package's.

    Raises:
        UserError: if the splits or columns cannot be told, or a column's type is none that is read.
    """
    splits = _splits(location, files)
    if info:
        splits = {s: [shard.file for shard in part.shards] for s, part in info.splits.items()}

    def open_file(file: str) -> pq.ParquetFile:
        return pq.ParquetFile(
            f"{path}/{file}", filesystem=filesystem, page_checksum_verification=True
        )

    first = splits["train"][0]
    with _reading(f"{location}/{first}"), open_file(first) as opened:
        schema = opened.schema_arrow
    image, label = _columns(schema, f"{location}/{first}", image_column, label_column)
    classes = info.classes if info else None
    if label and not pa.types.is_integer(schema.field(label).type):
        names: set[str] = set()
        for file in (file for part in splits.values() for file in part):
            with _reading(f"{location}/{file}"), open_file(file) as opened:
                for batch in opened.iter_batches(columns=[label]):
                    names.update(pc.unique(batch[label].cast(pa.string())).to_pylist())
        classes = sorted(names - {None})
    elif label and not classes:
        classes = _hugging_face_names(schema, label)
    number = {name: k for k, name in enumerate(classes or [])}
    columns = [name for name in (image, label, "id" if info else None) if name]

    def pictures(part: list[str]) -> Iterator[RawImage]:
        for file in part:
            where = f"{location}/{file}"
            with _reading(where), open_file(file) as opened:
                _columns(opened.schema_arrow, where, image, label or NO_LABELS)
                row = 0
                for batch in opened.iter_batches(AT_A_TIME, columns=columns):
                    wheres = [f"{where}, row {row + k}," for k in range(len(batch))]
                    row += len(batch)
                    labels = batch[label].to_pylist() if label else [None] * len(batch)
                    orders = batch["id"].to_pylist() if info else [None] * len(batch)
                    images = _images(batch[image], wheres)
                    for at, picture, value, order in zip(
                        wheres, images, labels, orders, strict=True
                    ):
                        if isinstance(value, str):
                            value = number[value]
                        yield RawImage(convert(picture, at), value, at, order)

    return (
        {split: pictures(part) for split, part in splits.items()},
        DatasetMetadata(
            name=location,
            source=info.source if info else without_secrets(location),
            licence=info.licence if info else None,
            classes=classes if label else None,
        ),
    )


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turns a failure to read into one sentence that names the file."""
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise UserError(
            f"{where} is damaged or cannot be read ({first_error_line(error)}): copy it again."
        ) from error


def _splits(location: str, files: list[str]) -> dict[str, list[str]]:
    """Sorts files by the first of their folders, or their own name, that begins with a split's."""
    splits: dict[str, list[str]] = {}
    for file in files:
        names = (SPLIT.match(part) for part in file.split("/"))
        found = next((SPLIT_NAMES[name[1]] for name in names if name), "")
        splits.setdefault(found, []).append(file)
    if list(splits) == [""]:
        return {"train": splits[""]}
    if "" in splits:
        raise UserError(
            f"{location} has files of named splits ({', '.join(s for s in splits if s)}), but "
            f"{splits[''][0]} names none: rename it to train-*.parquet or move it away."
        )
    if "train" not in splits:
        raise UserError(
            f"{location} has no split train but only {', '.join(splits)}: rename its files to "
            "train-*.parquet."
        )
    return splits


def _columns(
    schema: pa.Schema, where: str, image: str | None, label: str | None
) -> tuple[str, str | None]:
    """Returns the names of the image and the label column, after looking at their types."""
    there = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if image is None:
        usual = [name for name in ("image", "img") if name in schema.names]
        fitting = [field.name for field in schema if _is_image(field.type)]
        if not usual and len(fitting) != 1:
            raise UserError(
                f"{where} has {len(fitting) or 'no'} columns that can be images ({FORMS}): name "
                f"one with `--image-column`; it has {there}."
            )
        image = (usual or fitting)[0]
    for name in (image, label):
        if name not in (None, NO_LABELS) and name not in schema.names:
            raise UserError(f"{where} has no column {name}: it has {there}.")
    kind = schema.field(image).type
    if not _is_image(kind):
        raise UserError(
            f"{where} holds {kind} in its column {image}: convert it to {FORMS}, square, grey or "
            "RGB, or name another with `--image-column`."
        )
    if label == NO_LABELS:
        return image, None
    if label is None:
        if "label" not in schema.names:
            return image, None
        label = "label"
    kind = schema.field(label).type
    if not pa.types.is_integer(kind) and not _is_text(kind):
        raise UserError(
            f"{where} holds {kind} in its column {label}, and a class is a whole number or a name: "
            "name another with `--label-column`, or `none`."
        )
    return image, label


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_encoded(kind: pa.DataType) -> bool:
    """Whether a column holds image files, bare or as Hugging Face's struct of bytes and path."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_encoded(kind.field("bytes").type)
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_image(kind: pa.DataType) -> bool:
    return _is_encoded(kind) or _shape(kind) is not None


def _shape(kind: pa.DataType) -> tuple[int, ...] | None:
    """Returns the shape of raw pixels, [H, W], [H, W, C] or [C, H, W]; None if it holds no such."""
    if isinstance(kind, pa.FixedShapeTensorType):
        if kind.permutation not in (None, list(range(len(kind.shape)))):
            return None
        dimensions, kind = list(kind.shape), kind.value_type
    else:
        dimensions = []
        while pa.types.is_fixed_size_list(kind):
            dimensions.append(kind.list_size)
            kind = kind.value_type
    if kind != pa.uint8():
        return None
    if len(dimensions) == 1:  # a flat list, of a square
        for channels in (1, 3):
            side = math.isqrt(dimensions[0] // channels)
            if side * side * channels == dimensions[0]:
                return (side, side, channels)
    if len(dimensions) == 2 or (len(dimensions) == 3 and {dimensions[0], dimensions[2]} & {1, 3}):
        return tuple(dimensions)
    return None


def _images(column: pa.Array, wheres: list[str]) -> Iterator[Image.Image]:
    """Yields the images of a column, one for each of `wheres`."""
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    if column.null_count:
        missing = column.is_valid().index(False).as_py()
        raise UserError(f"{wheres[missing]} has no image: leave the row out.")
    shape = _shape(column.type)
    if shape is None:
        for where, cell in zip(wheres, column, strict=True):
            yield decode(cell.as_py(), where)
        return
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    while pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    if values.null_count:
        missing = values.is_valid().index(False).as_py() * len(wheres) // len(values)
        raise UserError(f"{wheres[missing]} has a pixel missing: leave the row out.")
    pixels = values.to_numpy().reshape(len(column), *shape)
    if len(shape) == 3 and shape[2] not in (1, 3):
        pixels = pixels.transpose(0, 2, 3, 1)
    for image in pixels:
        yield Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)


def _hugging_face_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Returns the class names that Hugging Face's `datasets` leaves in a file's metadata."""
    try:
        record: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = record["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    return names if isinstance(names, list) and all(isinstance(n, str) for n in names) else None
