"""Read images and labels that lie as whole arrays: MNIST's idx files, and NumPy's npz and npy.

Images are read one by one, so that memory does not grow with the arrays, compressed or not.
"""

import gzip
import itertools
import math
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cl_ray.data.conversion import Convert
from cl_ray.data.decoding import ImageLimits
from cl_ray.data.file_tree import FileTree, Note, damage_errors, listed
from cl_ray.data.labels import LabelValue, check_class_count, find_classes
from cl_ray.data.source_config import NO_LABELS, SourceConfig
from cl_ray.data.splits import SPLIT_NAMES, check_file_splits
from cl_ray.data.writer import DatasetMetadata, RawImage, SourceSplits
from cl_ray.errors import UserError, pluralize

_ENDING = re.compile(r"(\.npy|[-.]idx\d?([-.]ubyte)?(\.gz)?|[-.]ubyte(\.gz)?)$", re.IGNORECASE)
_IDX_TYPES = {8: "u1", 9: "i1", 11: ">i2", 12: ">i4", 13: ">f4", 14: ">f8"}
"""By the third byte of an idx file (http://yann.lecun.com/exdb/mnist/)."""
_SPLITS = SPLIT_NAMES | {"t10k": "test"}
_IMAGES = {"images", "image", "imgs", "img", "x", "pixels", "data"}
_LABELS = {"labels", "label", "y", "targets", "target", "classes", "class"}
_MAX_LABELS = 2**30
"""Bytes of an array of labels."""


@dataclass(frozen=True)
class _Array:
    """The header of an array.

    Args:
        file: Its file, or the member of an npz.
        shape: Of any rank.
        dtype: Of the values.
    """

    file: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def column(self) -> str:
        """What `--image-column` and `--label-column` call it."""
        return _ENDING.sub("", self.file.rpartition("/")[2])

    @property
    def is_images(self) -> bool:
        return len(self.shape) in (3, 4)

    @property
    def is_labels(self) -> bool:
        return len(self.shape) == 1 or (len(self.shape) == 2 and self.shape[1] == 1)

    @property
    def split(self) -> str:
        return next((_SPLITS[word] for word in _words(self.file) if word in _SPLITS), "")

    @property
    def group(self) -> frozenset[str]:
        """What the names of images and of their labels have in common."""
        return frozenset(_words(self.file)) - _IMAGES - _LABELS

    def has_word(self, words: set[str]) -> bool:
        """Return whether its name, without its file's, has one of the words."""
        return bool(words & {*_words(self.column)})


def is_array(file: str) -> bool:
    """Return whether a file is an idx or npy file, by its name; an npz is an archive of these."""
    return bool(_ENDING.search(file))


def read_arrays(
    tree: FileTree, files: list[str], config: SourceConfig, convert: Convert, note: Note
) -> SourceSplits:
    """Find the arrays of images, their labels and splits by their shapes and names.

    Images are uint8 [N, H, W], [N, H, W, C] or [N, C, H, W]. Their labels, [N] or [N, 1], have the
    same name but for a word such as `images` or `labels`, `x` or `y`. Of several that fit, the
    columns of `config` name one; by default it has a usual name.

    Raises:
        UserError: Arrays are damaged, ambiguous, of other types, or do not fit together.
    """
    image_column, label_column = config.image_column, config.label_column
    arrays: list[_Array] = []
    groups: dict[frozenset[str], list[_Array]] = {}
    for file in files:
        with _open_array(tree, file) as (_, array):
            arrays.append(array)
            groups.setdefault(array.group, []).append(array)
    splits: dict[str, list[tuple[_Array, NDArray[Any]]]] = {}
    used: set[str] = set()
    for group in groups.values():
        images = _choose(tree, [a for a in group if a.is_images], image_column, "image", _IMAGES)
        if images is None:
            continue
        _check_images(images, f"{tree.location}/{images.file}", config.limits)
        labels = None
        if label_column != NO_LABELS:
            fitting = [a for a in group if a.is_labels and (label_column or a.has_word(_LABELS))]
            labels = _choose(tree, fitting, label_column, "label", _LABELS)
        values = _read_labels(tree, labels, images) if labels else np.empty(0)
        split = images.split if config.splits == "auto" else "train"
        splits.setdefault(split, []).append((images, values))
        used |= {images.file, *([labels.file] if labels else [])}
    if not splits:
        shapes = listed([f"{array.file} {list(array.shape)}" for array in arrays])
        raise UserError(f"{tree.location} holds no array of images, [N, H, W, ...], but {shapes}.")
    for parts in splits.values():  # but batches 1, 2, ... of one name are one
        names = {frozenset(_words(images.column)) - _IMAGES - {*_SPLITS} for images, _ in parts}
        if len({frozenset(w for w in name if not w.isdigit()) for name in names}) > 1:
            _refuse_several(tree, [images for images, _ in parts], "image")
    has_labels = any(values.size for parts in splits.values() for _, values in parts)
    if label_column not in (None, NO_LABELS) and not has_labels:
        found = listed([array.column for array in arrays if array.is_labels])
        raise UserError(
            f"{tree.location} has no array of labels {label_column} ({found or 'it has none'}): "
            "leave `--label-column` out or name another."
        )
    unused = [array.file for array in arrays if array.file not in used]
    if unused and label_column != NO_LABELS:
        note(f"Left out, as neither images nor their labels: {listed(unused)}.")
    if set(splits) == {""}:
        splits = {"train": splits[""]}
    check_file_splits(
        tree.location, {s: [images.file for images, _ in parts] for s, parts in splits.items()}
    )
    distinct: set[LabelValue] = set()
    for _, values in itertools.chain(*splits.values()):
        distinct.update(np.unique(values).tolist())
    check_class_count(len(distinct), tree.location, "its array of labels")
    classes, class_indices = find_classes(distinct, "the array of labels", note)

    def read(parts: list[tuple[_Array, NDArray[Any]]]) -> Iterator[RawImage]:
        for images, values in parts:
            yield from _read_images(tree, images, values, class_indices, convert)

    return (
        {split: read(parts) for split, parts in splits.items()},
        DatasetMetadata(name=tree.location, source=tree.location, classes=classes),
    )


def _words(name: str) -> list[str]:
    """Return the words of a name in lower case, such as x and train of xTrain or x_train."""
    name = name.replace("arr_0", "images").replace("arr_1", "labels")  # of np.savez(file, x, y)
    name = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", _ENDING.sub("", name)).lower()
    name = re.sub(r"\b([xy])(?=train|test|val|dev)", r"\1_", name).replace(".npz", "")
    return [word for word in re.split(r"[^a-z0-9]+", name) if word]


@contextmanager
def _open_array(tree: FileTree, file: str) -> Iterator[tuple[IO[bytes], _Array]]:
    """Open an array; yield the stream, at its first value, and the header."""
    name = f"{tree.location}/{file}"
    with damage_errors(name, "an array", "copy it again"), tree.open(file) as raw:
        if file.lower().endswith(".npy"):
            read_header = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[np.lib.format.read_magic(raw)]
            shape, by_columns, dtype = read_header(raw)
            if (by_columns and len(shape) > 1) or dtype.hasobject:
                what = "Python objects" if dtype.hasobject else "values in Fortran's order"
                raise UserError(f"{name} holds {what}: save a plain array in C's.")
            yield raw, _Array(file, shape, dtype)
            return
        packed = file.lower().endswith(".gz")
        with cast(IO[bytes], gzip.open(raw)) if packed else raw as stream:
            zeros, code, rank = struct.unpack(">HBB", stream.read(4))
            if zeros or code not in _IDX_TYPES:
                raise ValueError("it is no idx file")
            shape = struct.unpack(f">{rank}I", stream.read(4 * rank))
            yield stream, _Array(file, shape, np.dtype(_IDX_TYPES[code]))


def _choose(
    tree: FileTree, arrays: list[_Array], given: str | None, kind: str, usual: set[str]
) -> _Array | None:
    """Return the array of a name that is given or usual, or the only one; None if there is none."""
    if given is not None:
        arrays = [array for array in arrays if array.column == given]
    named = [array for array in arrays if array.has_word(usual)]
    arrays = named if len(named) == 1 else arrays
    if len(arrays) > 1:
        _refuse_several(tree, arrays, kind)
    return arrays[0] if arrays else None


def _refuse_several(tree: FileTree, arrays: list[_Array], kind: str) -> None:
    raise UserError(
        f"{tree.location} holds several arrays that can be {kind}s "
        f"({listed([array.column for array in arrays])}): name one with `--{kind}-column`."
    )


def _check_images(array: _Array, name: str, limits: ImageLimits) -> None:
    if array.dtype != np.uint8:
        raise UserError(
            f"{name} holds {array.dtype} values: convert them to uint8, 0 to 255, or name another "
            "array with `--image-column`."
        )
    *_, height, width = array.shape
    if len(array.shape) == 3 and width in (1, 3, 4):
        raise UserError(
            f"{name} has the shape {list(array.shape)}, which is that of one image: stack all "
            "images to one array [N, height, width, channels]."
        )
    if len(array.shape) == 4:
        height, width = array.shape[2:] if _channels_first(array.shape) else array.shape[1:3]
        if not {1, 3, 4} & {array.shape[1], array.shape[3]}:
            raise UserError(f"{name} has the shape {list(array.shape)}, without 1 or 3 channels.")
    if min(array.shape) <= 0:
        raise UserError(f"{name} has the shape {list(array.shape)}: it holds no image.")
    limits.check(width, height, f"An image of {name}")


def _channels_first(shape: tuple[int, ...]) -> bool:
    return shape[3] not in (1, 3, 4)


def _read_labels(tree: FileTree, array: _Array, images: _Array) -> NDArray[Any]:
    name = f"{tree.location}/{array.file}"
    if array.shape[0] != images.shape[0]:
        raise UserError(
            f"{name} holds {pluralize(array.shape[0], 'label')} of the "
            f"{pluralize(images.shape[0], 'image')} in {images.file}: give one for each."
        )
    size = array.shape[0] * array.dtype.itemsize
    if size > _MAX_LABELS or array.dtype.kind not in "biufSU":
        raise UserError(f"{name} holds {array.dtype} values, which are no classes.")
    with _open_array(tree, array.file) as (stream, _):
        values = np.frombuffer(stream.read(size), array.dtype, array.shape[0])
    if array.dtype.kind == "f":
        if (values != np.rint(values)).any():
            raise UserError(f"{name} holds fractions, which are no classes.")
        values = values.astype(np.int64)
    if array.dtype.kind == "S":
        values = np.char.decode(values, "utf-8", "backslashreplace")
    if array.dtype.kind == "b":
        values = values.astype(np.str_)
    return values


def _read_images(
    tree: FileTree,
    array: _Array,
    labels: NDArray[Any],
    class_indices: dict[LabelValue, int],
    convert: Convert,
) -> Iterator[RawImage]:
    count, *shape = array.shape
    size = math.prod(shape)
    file = f"{tree.location}/{array.file}"
    with _open_array(tree, array.file) as (stream, _):
        for index in range(count):
            data = stream.read(size)
            if len(data) < size:
                raise EOFError(f"it ends after {index:,} of {pluralize(count, 'image')}")
            pixels = np.frombuffer(data, np.uint8).reshape(shape)
            if len(shape) == 3 and _channels_first(array.shape):
                pixels = np.ascontiguousarray(pixels.transpose(1, 2, 0))
            if pixels.shape[2:] == (1,):
                pixels = pixels[..., 0]
            name = f"{file}, image {index},"
            label = class_indices.get(labels[index].item()) if labels.size else None
            origin = f"{array.file}, image {index}"
            yield RawImage(convert(Image.fromarray(pixels), name), label, name, origin=origin)
