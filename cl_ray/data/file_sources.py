"""Convert images to pixels, and read the images of Parquet files.

Parquet is read through pyarrow's `ParquetFile`, in order and with page checksums.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs as pafs
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from cl_ray.data.dataset import DatasetInfo
from cl_ray.data.decoding import ImageLimits, decode_image, decoder_errors
from cl_ray.data.depth import DepthRange, is_deep
from cl_ray.data.writer import SPLIT_NAMES, DatasetMetadata, RawImage, SourceSplits
from cl_ray.errors import UserError, first_error_line
from cl_ray.storage import without_options

Color = Literal["keep", "grey", "rgb"]
Convert = Callable[[Image.Image, str], NDArray[np.uint8]]
"""`to_pixels` with its options bound: an image and its name → [H, W, C]."""
SplitChoice = Literal["auto", "none"]
"""Whether names of files and folders can be splits."""
NO_LABELS = "none"
"""The value of `--label-column` that leaves the labels out."""

_CHUNK = 256
"""Images that are read at once, at most."""
_CHUNK_BYTES = 2**26
"""Bytes of Parquet cells that are read at once, unless one is larger."""
_SPLIT_NAME = re.compile(
    rf"({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)
_IMAGE_TYPES = "uint8 pixels of one shape (a tensor or fixed-size list) or encoded image files"


def to_pixels(
    image: Image.Image,
    name: str,
    size: int | None,
    color: Color,
    background: str | None = None,
    depth: DepthRange | None = None,
) -> NDArray[np.uint8]:
    """Convert an image to pixels.

    Args:
        image: Of any of Pillow's modes.
        name: What error messages call it.
        size: Scale the shorter side to this many pixels, antialiased, and crop the center square;
            None keeps the size.
        color: `grey` and `rgb` convert, `keep` keeps which of the two it is.
        background: Color that transparent pixels are laid on, a name or `#rrggbb`.
        depth: The range that is mapped to 8 bits, for images of more.

    Returns:
        [H, W, C] uint8, C 1 (grey) or 3 (RGB).

    Raises:
        UserError: A pixel is transparent and there is no background, the image has more than 8
            bits a channel and there is no range, or `keep` meets neither grey nor RGB.
    """
    with decoder_errors(name):
        return _to_pixels(image, name, size, color, background, depth)


def _to_pixels(
    image: Image.Image,
    name: str,
    size: int | None,
    color: Color,
    background: str | None,
    depth: DepthRange | None,
) -> NDArray[np.uint8]:
    if is_deep(image):
        if depth is None:
            raise UserError(
                f"{name} has more than 8 bits a channel: convert it to 8 bits, or add "
                "`--scale-depth` to map the smallest to the largest value of all images to 0 to "
                "255."
            )
        image = depth.scale(image)
    if image.has_transparency_data:
        opaque = image if image.mode == "RGBA" else image.convert("RGBA")
        grey = image.mode in ("1", "L", "LA", "La")
        if opaque.getchannel("A").getextrema()[0] != 255:
            if background is None:
                raise UserError(
                    f"{name} is partly transparent: add `--background white`, or another color, "
                    "to lay it on."
                )
            red, green, blue = ImageColor.getrgb(background)[:3]
            below = Image.new("RGBA", opaque.size, (red, green, blue))
            opaque = Image.alpha_composite(below, opaque)
            grey = grey and red == green == blue
        image = opaque.convert("L" if grey else "RGB")
    elif image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if image.mode not in ("L", "RGB"):
        if color == "keep":
            raise UserError(f"{name} is stored as {image.mode}: add `--color rgb` to convert it.")
        image = image.convert("RGB")
    if color != "keep":
        image = image.convert("L" if color == "grey" else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, -1)


def read_parquet_source(
    location: str,
    filesystem: pafs.FileSystem,
    path: str,
    files: list[str],
    convert: Convert,
    limits: ImageLimits,
    image_column: str | None = None,
    label_column: str | None = None,
    info: DatasetInfo | None = None,
    split_choice: SplitChoice = "auto",
) -> SourceSplits:
    """Find the splits, columns and classes of Parquet files, and read their images lazily.

    Args:
        location: The folder as the user named it.
        filesystem: The filesystem that holds it.
        path: Its path there.
        files: The Parquet files in it, relative to it and sorted.
        convert: Makes pixels of an image.
        limits: Which images are refused.
        image_column: None is the column `image` or `img`, or else the only one that fits.
        label_column: None is the column `label`, if there is one; `none` is no labels.
        info: The record of the folder, if it is a dataset of this package's.
        split_choice: Whether names of files and folders can be splits.

    Raises:
        UserError: The splits or columns are ambiguous, or a column has an unsupported type.
    """
    splits = find_file_splits(location, files, split_choice)
    if info and split_choice == "auto":
        splits = {s: [shard.file for shard in split.shards] for s, split in info.splits.items()}

    @contextlib.contextmanager
    def opened(file: str) -> Iterator[pq.ParquetFile]:
        try:
            with pq.ParquetFile(
                f"{path}/{file}", filesystem=filesystem, page_checksum_verification=True
            ) as parquet:
                yield parquet
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(
                f"{location}/{file} is damaged or cannot be read ({first_error_line(error)}): "
                "copy it again."
            ) from error

    first = splits["train"][0]
    with opened(first) as parquet:
        schema = parquet.schema_arrow
    image, label = _find_columns(schema, f"{location}/{first}", image_column, label_column)
    classes = info.classes if info else None
    if label and not pa.types.is_integer(schema.field(label).type):
        names: set[str | None] = set()
        for file in (file for split in splits.values() for file in split):
            with opened(file) as parquet:
                for batch in parquet.iter_batches(columns=[label]):
                    names.update(pc.unique(batch[label].cast(pa.string())).to_pylist())
        classes = sorted(name for name in names if name is not None)
    elif label and not classes:
        classes = _hugging_face_names(schema, label)
    labels_by_name = {name: index for index, name in enumerate(classes or [])}
    known = ("id", *["origin"] * info.origins) if info else ()  # of a dataset that was written here
    columns = [name for name in (image, label, *known) if name]

    def images(files: list[str]) -> Iterator[RawImage]:
        for file in files:
            with opened(file) as parquet:
                _find_columns(parquet.schema_arrow, f"{location}/{file}", image, label or NO_LABELS)
                shape = _pixel_shape(parquet.schema_arrow.field(image).type)
                if shape:
                    height, width = shape[1:] if _channels_first(shape) else shape[:2]
                    limits.check(width, height, f"An image of {location}/{file}")
                row = 0
                for batch in parquet.iter_batches(_batch_rows(parquet, image), columns=columns):
                    names = [f"{location}/{file}, row {row + k}," for k in range(len(batch))]
                    origins = [f"{file}, row {row + k}" for k in range(len(batch))]
                    if "origin" in columns:
                        origins = batch["origin"].to_pylist()
                    row += len(batch)
                    labels = batch[label].to_pylist() if label else [None] * len(batch)
                    indices = batch["id"].to_pylist() if info else [None] * len(batch)
                    decoded = _decode_column(batch[image], names, limits)
                    for name, pixels, value, index, origin in zip(
                        names, decoded, labels, indices, origins, strict=True
                    ):
                        class_index = labels_by_name[value] if isinstance(value, str) else value
                        yield RawImage(convert(pixels, name), class_index, name, index, origin)

    return (
        {split: images(files) for split, files in splits.items()},
        DatasetMetadata(
            name=location,
            source=info.source if info else without_options(location),
            licence=info.licence if info else None,
            classes=classes if label else None,
        ),
    )


def find_file_splits(
    location: str, files: list[str], split_choice: SplitChoice
) -> dict[str, list[str]]:
    """Group files by the first of their folders, or their own name, that begins with a split's.

    Raises:
        UserError: Only some files name a split, or none names the training split.
    """
    splits: dict[str, list[str]] = {}
    for file in files if split_choice == "auto" else ():
        matches = (_SPLIT_NAME.match(part) for part in file.split("/"))
        split = next((SPLIT_NAMES[match[1].lower()] for match in matches if match), "")
        splits.setdefault(split, []).append(file)
    if set(splits) <= {""}:
        return {"train": files}
    way_out = "add `--splits none` if all are training images"
    if "" in splits:
        raise UserError(
            f"{location} has files of named splits ({', '.join(s for s in splits if s)}), but "
            f"{splits[''][0]} names none: rename it to train-*, move it away, or {way_out}."
        )
    if "train" not in splits:
        raise UserError(
            f"{location} has no training split but only {', '.join(splits)}: rename its files to "
            f"train-*, or {way_out}."
        )
    return splits


def _find_columns(
    schema: pa.Schema, file: str, image: str | None, label: str | None
) -> tuple[str, str | None]:
    """Return the names of the image and the label column, after checking their types."""
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if image is None:
        usual = [name for name in ("image", "img") if name in schema.names]
        fitting = [field.name for field in schema if _is_image(field.type)]
        if not usual and len(fitting) != 1:
            raise UserError(
                f"{file} has {len(fitting) or 'no'} columns that can be images ({_IMAGE_TYPES}): "
                f"name one with `--image-column`; it has {columns}."
            )
        image = (usual or fitting)[0]
    for name in (image, label):
        if name not in (None, NO_LABELS) and name not in schema.names:
            raise UserError(f"{file} has no column {name}: it has {columns}.")
    kind = schema.field(image).type
    if not _is_image(kind):
        raise UserError(
            f"{file} holds {kind} in its column {image}: convert it to {_IMAGE_TYPES}, square, "
            "grey or RGB, or name another with `--image-column`."
        )
    if label == NO_LABELS or (label is None and "label" not in schema.names):
        return image, None
    label = label or "label"
    kind = schema.field(label).type
    if not pa.types.is_integer(kind) and not _is_text(kind):
        raise UserError(
            f"{file} holds {kind} in its column {label}, and a class is a whole number or a name: "
            "name another with `--label-column`, or `none`."
        )
    return image, label


def _is_text(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


def _is_image(kind: pa.DataType) -> bool:
    """Whether a column holds pixels or image files, bare or in Hugging Face's struct."""
    if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
        kind = kind.field("bytes").type
    encoded = pa.types.is_binary(kind) or pa.types.is_large_binary(kind)
    return encoded or _pixel_shape(kind) is not None


def _pixel_shape(kind: pa.DataType) -> tuple[int, ...] | None:
    """Return the shape of raw pixels, [H, W], [H, W, C] or [C, H, W]; None for other types."""
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
    if len(dimensions) == 1:  # a flat list of the pixels of a square
        for channels in (1, 3):
            side = math.isqrt(dimensions[0] // channels)
            if side * side * channels == dimensions[0]:
                return (side, side, channels)
    if len(dimensions) == 2 or (len(dimensions) == 3 and {dimensions[0], dimensions[2]} & {1, 3}):
        return tuple(dimensions)
    return None


def _channels_first(shape: tuple[int, ...]) -> bool:
    return len(shape) == 3 and shape[2] not in (1, 3)


def _batch_rows(parquet: pq.ParquetFile, image: str) -> int:
    """Return how many rows are read at once: their images have about _CHUNK_BYTES, by the file."""
    largest = max(1, math.prod(_pixel_shape(parquet.schema_arrow.field(image).type) or ()))
    for group in map(parquet.metadata.row_group, range(parquet.num_row_groups)):
        chunks = map(group.column, range(group.num_columns))
        size = sum(c.total_uncompressed_size for c in chunks if c.path_in_schema.startswith(image))
        largest = max(largest, size // max(1, group.num_rows))
    return max(1, min(_CHUNK, _CHUNK_BYTES // largest))


def _decode_column(
    column: pa.Array, names: list[str], limits: ImageLimits
) -> Iterator[Image.Image]:
    """Yield the images of a column; `names` are what error messages call them."""
    if pa.types.is_struct(column.type):
        column = pc.struct_field(column, "bytes")
    if column.null_count:
        missing = column.is_valid().index(False).as_py()
        raise UserError(f"{names[missing]} has no image: leave the row out.")
    shape = _pixel_shape(column.type)
    if shape is None:
        for name, cell in zip(names, column, strict=True):
            yield decode_image(cell.as_py(), name, limits)
        return
    values = column.storage if isinstance(column, pa.ExtensionArray) else column
    while pa.types.is_fixed_size_list(values.type):
        values = values.flatten()
    if values.null_count:
        missing = values.is_valid().index(False).as_py() * len(names) // len(values)
        raise UserError(f"{names[missing]} has a pixel missing: leave the row out.")
    pixels = values.to_numpy().reshape(len(column), *shape)
    if _channels_first(shape):
        pixels = pixels.transpose(0, 2, 3, 1)
    for image in pixels:
        yield Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)


def _hugging_face_names(schema: pa.Schema, label: str) -> list[str] | None:
    """Return the class names that Hugging Face's `datasets` stores in a file's metadata."""
    try:
        record: Any = json.loads((schema.metadata or {})[b"huggingface"])
        names = record["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None
    return [name.encode(errors="backslashreplace").decode() for name in names]  # surrogates
