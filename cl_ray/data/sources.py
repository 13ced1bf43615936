"""A name or a path → a data set: torchvision's sets, stacked digits, folders, Parquet."""

import difflib
import os
from dataclasses import replace
from functools import partial

import pyarrow.fs as pafs
from pydantic import Field

from cl_ray.base_config import BaseConfig
from cl_ray.data.dataset import (
    INFO_FILE,
    LARGEST,
    PACKAGED,
    SMALLEST,
    STACKED,
    Dataset,
    DatasetInfo,
    first_error_line,
    open_filesystem,
)
from cl_ray.data.image_folder import read_image_folder
from cl_ray.data.image_ops import Color, to_pixels
from cl_ray.data.parquet_source import NO_LABELS, read_parquet_source
from cl_ray.data.stacked_mnist import COUNTS, read_stacked_mnist
from cl_ray.data.torchvision_source import read_torchvision, torchvision_names
from cl_ray.data.writer import Progress, RawImage, SourceSplits, check_output_free, write_splits
from cl_ray.errors import UserError

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")


class SourceConfig(BaseConfig):
    """Makes a data set (Parquet files and dataset.json) of images that lie elsewhere."""

    source: str = Field(
        min_length=1,
        description="A torchvision data set (MNIST, FashionMNIST, CIFAR10, SVHN, ...), `mnist` "
        f"(the packaged one), `{STACKED}` (three packaged digits in the colours of an image, 1000 "
        "classes), or a folder or URI (s3://, gs://, ...) of images or of Parquet files. A folder "
        "of images may have a subfolder a class, and train/ and test/ on top.",
    )
    out: str = Field(min_length=1, description="Folder or URI that the data set is written to.")
    size: int | None = Field(
        None,
        ge=SMALLEST,
        le=LARGEST,
        description="Scale each image's shorter side to this many pixels and cut out the middle "
        f"square. Without it, images that are not one square size of {SMALLEST} to {LARGEST} are "
        "refused.",
    )
    color: Color = Field(
        "keep", description="Convert to grey or rgb; `keep` refuses a mixture of the two."
    )
    root: str = Field("data", description="Where torchvision keeps, or will put, its downloads.")
    test_fraction: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the images, drawn at random, to hold out for testing.",
    )
    count: int | None = Field(
        None,
        ge=1,
        description=f"Images that {STACKED} makes for training; by default {COUNTS['train']:,}.",
    )
    test_count: int | None = Field(
        None,
        ge=1,
        description=f"Images that {STACKED} makes for testing; by default {COUNTS['test']:,}.",
    )
    image_column: str | None = Field(
        None, description="Parquet column of the images: uint8 pixels or encoded files."
    )
    label_column: str | None = Field(
        None,
        description="Parquet column of the classes; by default `label`, if there is one. `none` "
        "leaves the labels of any source out.",
    )
    licence: str | None = Field(None, description="Terms of use, recorded with the data.")
    seed: int = Field(
        0,
        ge=0,
        description="Decides the order of the rows, which are held out and which digits are "
        "stacked.",
    )
    overwrite: bool = Field(False, description="Replace the data set that is at `out`.")


def write_dataset(config: SourceConfig, progress: Progress | None = None) -> DatasetInfo:
    """Makes a data set of the images of a source.

    Args:
        config: what, where to and how.
        progress: called every now and then with what is being done and how far.

    Returns:
        What is recorded with the data set.

    Raises:
        UserError: if the source cannot be found or read, its images do not go together or need
            a choice that was not made, or `out` is taken or cannot be written. Then `out` has no
            new data set, and a local folder still holds what it held.
    """
    check_output_free(config.out, config.overwrite)  # before a download rather than after it
    splits, about = read_source(config)
    if config.label_column == NO_LABELS:
        splits = {split: map(_unlabelled, pictures) for split, pictures in splits.items()}
        about = replace(about, classes=None)
    return write_splits(
        splits,
        config.out,
        replace(
            about,
            name=os.path.basename(open_filesystem(config.out)[1]),
            licence=config.licence or about.licence,
        ),
        test_fraction=config.test_fraction,
        seed=config.seed,
        overwrite=config.overwrite,
        progress=progress,
    )


def _unlabelled(picture: RawImage) -> RawImage:
    return replace(picture, label=None)


def read_source(config: SourceConfig) -> SourceSplits:
    """Finds what `config.source` means; no image is read yet.

    Raises:
        UserError: if it is neither a known name nor a readable folder with images.
    """
    source = config.source
    convert = partial(to_pixels, size=config.size, color=config.color)
    asked = {"train": config.count, "test": config.test_count}
    if source == STACKED:
        counts = {split: asked[split] or count for split, count in COUNTS.items()}
        return read_stacked_mnist(counts, config.seed, convert)
    if any(asked.values()):
        raise UserError(
            f"--count and --test-count say how many images {STACKED} makes; {source} has as many "
            "as it has: leave them out."
        )
    bare = "/" not in source and source not in (".", "..", PACKAGED)
    names = torchvision_names() if bare else {}
    if source in names:
        return read_torchvision(source, names[source], config.root, convert)
    filesystem, path = open_filesystem(source)
    try:
        kind = filesystem.get_file_info(path).type
        files = _listing(filesystem, path) if kind == pafs.FileType.Directory else []
    except OSError as error:
        raise UserError(f"{source} cannot be read: {first_error_line(error)}.") from error
    if kind == pafs.FileType.NotFound and bare:
        lower = {name.lower(): name for name in (STACKED, *names)}
        close = difflib.get_close_matches(source.lower(), lower, 3, 0.5)
        hint = f" (closest: {', '.join(lower[name] for name in close)})" if close else ""
        raise UserError(
            f"{source} is neither a folder nor a data set of torchvision's{hint}: give a folder, "
            f"or one of {', '.join([STACKED, *names])}."
        )
    if kind == pafs.FileType.NotFound:
        raise UserError(f"{source} does not exist: give a folder or the name of a data set.")
    if kind == pafs.FileType.File:
        raise UserError(f"{source} is a file: give the folder that it lies in.")
    parquet = [file for file in files if file.endswith(".parquet")]
    images = [file for file in files if file.lower().endswith(IMAGE_ENDINGS)]
    if parquet and images:
        raise UserError(
            f"{source} holds both {images[0]} and {parquet[0]}: give a folder with one of the two."
        )
    if images:
        return read_image_folder(source, filesystem, path, images, convert)
    if parquet:
        info = Dataset.open(source).info if INFO_FILE in files else None
        return read_parquet_source(
            source,
            filesystem,
            path,
            parquet,
            convert,
            config.image_column,
            config.label_column,
            info,
        )
    raise UserError(
        f"{source} holds no image ({', '.join(IMAGE_ENDINGS)}) and no .parquet file: give the "
        "folder that does."
    )


def _listing(filesystem: pafs.FileSystem, path: str) -> list[str]:
    """Returns the files below a folder, relative to it and sorted, without the hidden ones."""
    found = filesystem.get_file_info(pafs.FileSelector(path, recursive=True))
    files = sorted(
        info.path.removeprefix(path).lstrip("/")
        for info in found
        if info.type == pafs.FileType.File
    )
    return [
        file
        for file in files
        if not any(part.startswith((".", "__MACOSX")) for part in file.split("/"))
    ]
