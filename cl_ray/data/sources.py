"""Make a dataset of a source: torchvision's datasets, stacked digits, image folders, Parquet."""

import difflib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Literal

import pyarrow.fs as pafs
from PIL import ImageColor
from pydantic import Field, field_validator

from cl_ray.base_config import BaseConfig
from cl_ray.data.archives import is_archive, open_archives
from cl_ray.data.arrays import is_array, read_arrays
from cl_ray.data.conversion import DepthMeter, DepthRange
from cl_ray.data.dataset import (
    INFO_FILE,
    MAX_SIDE,
    MIN_SIDE,
    PACKAGED,
    STACKED,
    Dataset,
    DatasetInfo,
    open_dataset_location,
)
from cl_ray.data.decoding import ENDINGS, FORMATS, MAX_PIXELS, ImageLimits
from cl_ray.data.file_sources import NO_LABELS, Color, Convert, LabelValue, to_pixels
from cl_ray.data.file_tree import FileTree, Note, counted, ending, list_folder, tree_of_files
from cl_ray.data.image_folder import read_image_folder
from cl_ray.data.label_files import FILE_COLUMNS, LABEL_COLUMNS, find_label_files, read_label_files
from cl_ray.data.parquet_source import ChannelOrder, read_parquet_source
from cl_ray.data.splits import SPLIT_NAMES, SplitChoice
from cl_ray.data.stacked_mnist import STACKED_COUNTS, read_stacked_mnist
from cl_ray.data.torchvision_source import read_torchvision, torchvision_names
from cl_ray.data.writer import (
    MIN_HELD_OUT,
    SKIPPED_FILE,
    VALIDATION_FRACTION,
    ProgressCallback,
    RawImage,
    ReadImage,
    SourceSplits,
    check_output_free,
    write_splits,
)
from cl_ray.errors import UserError, first_error_line
from cl_ray.storage import open_filesystem, without_options

_FSSPEC = ("hf://", "fsspec+")
"""Beginnings of URIs that are read by libraries which raise errors of their own."""


class SourceConfig(BaseConfig):
    """Make a dataset (Parquet files and dataset.json) of images that lie elsewhere."""

    source: str = Field(
        min_length=1,
        description="A torchvision dataset (MNIST, FashionMNIST, CIFAR10, SVHN, ...), `mnist` "
        f"(the packaged one), `{STACKED}` (three packaged digits as the channels of an image, 1000 "
        "classes), or a folder, file or URI (s3://, gs://, hf://datasets/OWNER/NAME, ...) of "
        "images, zip or tar archives of images (WebDataset too), Parquet, npz or idx. A folder of "
        "images may have a subfolder per class, and train/, validation/ and test/ on top.",
    )
    splits: SplitChoice = Field(
        "auto",
        description=f"auto: top folders or files named as splits ({', '.join(SPLIT_NAMES)}) are "
        "splits. none: such folders are classes like others, and all images are for training.",
    )
    out: str = Field(min_length=1, description="Folder or URI that the dataset is written to.")
    size: int | None = Field(
        None,
        ge=MIN_SIDE,
        le=MAX_SIDE,
        description="Scale each image's shorter side to this many pixels and crop the center "
        f"square. Without it, images that are not one square size of {MIN_SIDE} to {MAX_SIDE} are "
        "refused.",
    )
    color: Color = Field(
        "keep", description="Convert to grey or rgb; `keep` refuses a mixture of the two."
    )
    background: str | None = Field(
        None,
        description="Color to lay transparent images on, such as white or #rrggbb. Without it, "
        "they are refused.",
    )
    scale_depth: bool = Field(
        False,
        description="Map grey images of more than 8 bits to 8: the smallest value of all images "
        "to 0, the largest to 255. Without it, they are refused.",
    )
    skip_broken: bool = Field(
        False,
        description=f"Leave out images that cannot be read, and list them in {SKIPPED_FILE} "
        "beside the data. Without it, they are refused.",
    )
    max_pixels: int = Field(
        MAX_PIXELS,
        ge=1,
        description="Refuse images with more pixels, before they are decoded. The largest takes "
        "up to 20 bytes of memory a pixel.",
    )
    root: str = Field("data", description="Folder of torchvision's downloads.")
    validation_fraction: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="Fraction of the training images, of every class alike, to hold out as the "
        "split validation: checkpoints and settings are chosen by it. None is "
        f"{VALIDATION_FRACTION:g}, if the source has no such split and at least "
        f"{MIN_HELD_OUT / VALIDATION_FRACTION:.0f} images.",
    )
    test_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="The same for the split test, which only `cl-ray evaluate` measures on.",
    )
    count: int | None = Field(
        None,
        ge=1,
        description=f"Training images of {STACKED}; by default {STACKED_COUNTS['train']:,}.",
    )
    test_count: int | None = Field(
        None,
        ge=1,
        description=f"Test images of {STACKED}, and as many validation images; by default "
        f"{STACKED_COUNTS['test']:,}.",
    )
    image_column: str | None = Field(
        None,
        description="Parquet column of the images: pixels (whole numbers from 0 to 255, floats "
        "from 0 to 1 or from -1 to 1), encoded image files, or paths of image files. Of an npz "
        "file, the name of the array of images.",
    )
    channels: ChannelOrder | None = Field(
        None,
        description="Order of colour pixels that Parquet holds as flat lists: first is all of "
        "red, then green, then blue; last is red, green and blue of each pixel. None is the order "
        "in which the images are smooth.",
    )
    label_column: str | None = Field(
        None,
        description="Column of the classes, in Parquet (by default `label`, if there is one) or "
        f"in a table beside image files (one of {', '.join(LABEL_COLUMNS)}). `none` leaves the "
        "labels of any source out. Of an npz file, the name of the array of labels.",
    )
    file_column: str | None = Field(
        None,
        description="Column of the names of image files in a table beside them (labels.csv, "
        f"metadata.jsonl, ...); by default one of {', '.join(FILE_COLUMNS)}.",
    )
    unlabelled: Literal["keep", "drop"] = Field(
        "keep",
        description="Whether to keep images without a label where others have one. G and D can be "
        "conditioned on classes only if all training images have labels.",
    )
    licence: str | None = Field(None, description="Terms of use, recorded with the data.")
    seed: int = Field(
        0,
        ge=0,
        description="Determines the order of the rows, which are held out and which digits are "
        "stacked.",
    )
    overwrite: bool = Field(False, description="Replace the dataset that is at `out`.")

    @field_validator("background")
    @classmethod
    def _check_background(cls, background: str | None) -> str | None:
        try:
            ImageColor.getrgb(background or "white")
        except ValueError as error:
            raise ValueError(
                f"background {background!r} is refused: give a color's name, such as white, or "
                "#rrggbb"
            ) from error
        return background


def write_dataset(
    config: SourceConfig, progress: ProgressCallback | None = None, note: Note = print
) -> DatasetInfo:
    """Make a dataset of the images of a source.

    Args:
        config: The source, the target and the conversion.
        progress: Called now and then with the stage and the number of images done.
        note: Called with a sentence on what is left out of the source.

    Returns:
        The content of its `dataset.json`.

    Raises:
        UserError: The source cannot be found or read, its images do not fit together or need an
            option, or `out` exists or cannot be written. Then there is no new dataset, and a
            local `out` is unchanged.
    """
    check_output_free(config.out, config.overwrite)  # before a download
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="PIL")  # damaged metadata, unusual sizes
        try:
            return _write_dataset(config, progress, note)
        except UserError:
            raise
        except Exception as error:
            if not config.source.startswith(_FSSPEC):
                raise
            raise UserError(
                f"{config.source} cannot be read ({type(error).__name__}: "
                f"{first_error_line(error)}): check its name, the network and HF_TOKEN, or "
                "download it and give the folder."
            ) from error


def _write_dataset(
    config: SourceConfig, progress: ProgressCallback | None, note: Note
) -> DatasetInfo:
    depth = _measure_depth(config, progress, note) if config.scale_depth else None
    convert = partial(
        to_pixels, size=config.size, color=config.color, background=config.background, depth=depth
    )
    splits, metadata = read_source(config, convert, note)
    if config.label_column == NO_LABELS:
        splits = {
            split: (
                replace(raw, label=None) if isinstance(raw, RawImage) else raw for raw in images
            )
            for split, images in splits.items()
        }
        metadata = replace(metadata, classes=None)
    dropped = Counter[str]()

    def labelled(split: str, images: Iterable[ReadImage]) -> Iterator[ReadImage]:
        for image in images:
            if isinstance(image, RawImage) and image.label is None:
                dropped[split] += 1
            else:
                yield image

    if config.unlabelled == "drop":
        splits = {split: labelled(split, images) for split, images in splits.items()}
    info = write_splits(
        splits,
        config.out,
        replace(
            metadata,
            name=os.path.basename(open_filesystem(config.out)[1]),
            licence=config.licence or metadata.licence,
        ),
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
        overwrite=config.overwrite,
        skip_broken=config.skip_broken,
        progress=progress,
        note=note,
    )
    if dropped:
        note(f"Left out, having no label: {counted(dropped)}.")
    return info


def _measure_depth(
    config: SourceConfig, progress: ProgressCallback | None, note: Note
) -> DepthRange:
    """Read all images for the range of their pixels."""
    meter = DepthMeter()
    splits, _ = read_source(config, meter.measure, lambda _: None)
    for split, images in splits.items():
        count = sum(isinstance(image, RawImage) for image in images)
        if progress:
            progress(f"measuring {split}", count, count)
    depth = meter.compute_range()
    note(f"The pixels {depth.low:g} to {depth.high:g} are mapped to 0 to 255.")
    return depth


def read_source(config: SourceConfig, convert: Convert, note: Note = print) -> SourceSplits:
    """Find the source that `config.source` names; its images are read lazily.

    Args:
        config: The source.
        convert: Makes pixels of an image.
        note: Called with a sentence on what is left out of the source.

    Raises:
        UserError: It is neither a known name nor a readable folder with images.
    """
    source = config.source
    limits = ImageLimits(config.max_pixels, None if config.size else MAX_SIDE)
    requested = {split: config.test_count for split in STACKED_COUNTS} | {"train": config.count}
    if source == STACKED:
        counts = {split: requested[split] or count for split, count in STACKED_COUNTS.items()}
        return read_stacked_mnist(counts, config.seed, convert)
    if any(requested.values()):
        raise UserError(
            f"--count and --test-count say how many images {STACKED} makes; the number of images "
            f"of {source} is fixed: leave them out."
        )
    bare = "/" not in source and source not in (".", "..", PACKAGED)
    names = torchvision_names() if bare else {}
    if source in names:
        return read_torchvision(source, names[source], config.root, convert, limits)
    filesystem, path = open_dataset_location(source)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {first_error_line(error)}.") from error
    kind = info.type
    if kind == pafs.FileType.NotFound and bare:
        lower = {name.lower(): name for name in (STACKED, *names)}
        close = difflib.get_close_matches(source.lower(), lower, 3, 0.5)
        hint = f" (closest: {', '.join(lower[name] for name in close)})" if close else ""
        raise UserError(
            f"{source} is neither a folder nor a dataset of torchvision's{hint}: give a folder, "
            f"or one of {', '.join([STACKED, *names])}."
        )
    if kind == pafs.FileType.NotFound:
        raise UserError(f"{source} does not exist: give a folder or the name of a dataset.")
    if kind == pafs.FileType.Directory:
        tree = list_folder(source, filesystem, path, note)
        return _read_files(config, tree, filesystem, path, convert, limits, note)
    path, _, name = path.rpartition("/")
    folder = source.rpartition("/")[0] or ("/" if source.startswith("/") else ".")
    tree = tree_of_files(folder, filesystem, path, {name: info.size})
    splits, metadata = _read_files(config, tree, filesystem, path, convert, limits, note)
    return splits, replace(metadata, name=name, source=without_options(source))


def _read_files(
    config: SourceConfig,
    tree: FileTree,
    filesystem: pafs.FileSystem,
    path: str,
    convert: Convert,
    limits: ImageLimits,
    note: Note,
) -> SourceSplits:
    """Read images of files of one kind: images, arrays, archives of these, or Parquet."""
    kinds = _files_by_kind(tree, config.image_column)
    if kinds["archive"]:
        tree = open_archives(tree, kinds["archive"], config.splits, note)
        kinds = _files_by_kind(tree, config.image_column)
    images, parquet, arrays = kinds["image"], kinds["parquet"], kinds["array"]
    if parquet and parquet[0] in tree.layout:
        raise UserError(f"{tree.location}/{parquet[0]} is in an archive: unpack it first.")
    with_labels = config.label_column != NO_LABELS
    tables = find_label_files(tree, images) if images and not parquet and with_labels else []
    own = INFO_FILE in tree.sizes and bool(parquet)
    unused = set() if own else set(tree.sizes).difference(images, parquet, arrays, tables)
    endings = counted(Counter(ending(file) or "without an ending" for file in unused))
    if not images and not parquet and not arrays:
        raise UserError(
            f"{config.source} holds no image ({', '.join(FORMATS)}), zip, tar, npz, npy, idx or "
            f"Parquet file {f'but {endings}' if unused else 'at all'}: give what does, or convert "
            "it."
        )
    if unused:
        note(f"Left out, by the endings of their names: {endings}.")
    if images and not parquet:
        labels: Mapping[str, LabelValue] | None = {}
        if with_labels:
            labels = read_label_files(
                tree, tables, images, config.file_column, config.label_column, note
            )
        return read_image_folder(tree, images, convert, limits, config.splits, labels, note)
    if arrays:
        return read_arrays(
            tree,
            arrays,
            convert,
            limits,
            config.image_column,
            config.label_column,
            config.splits,
            note,
        )
    return read_parquet_source(
        tree.location,
        filesystem,
        path,
        parquet,
        convert,
        limits,
        config.image_column,
        config.label_column,
        config.channels,
        Dataset.open(tree.location).info if own else None,
        config.splits,
        note,
    )


def _files_by_kind(tree: FileTree, image_column: str | None) -> dict[str, list[str]]:
    """Return the files that can be read, by their kind.

    Raises:
        UserError: They are of several kinds.
    """
    kinds = {
        "image": [file for file in tree.sizes if ending(file) in ENDINGS],
        "archive": [file for file in tree.sizes if is_archive(file)],
        "parquet": [file for file in tree.sizes if ending(file) == ".parquet"],
        "array": [file for file in tree.sizes if is_array(file)],
    }
    found = {kind: files[0] for kind, files in kinds.items() if files}
    if len(found) > 1 and not (found.keys() == {"image", "parquet"} and image_column):
        first, second, *_ = found.values()
        column = "parquet" in found
        raise UserError(
            f"{tree.location} holds both {first} and {second}: give a folder with one of the two"
            f"{', or name the Parquet column of the images, or of their paths, with ' * column}"
            f"{'`--image-column`' * column}."
        )
    return kinds
