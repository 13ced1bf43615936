"""Make a dataset of a source: torchvision's datasets, stacked digits, image folders, Parquet."""

import difflib
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from os.path import exists

import pyarrow.fs as pafs

from cl_ray.data.archives import is_archive, open_archives
from cl_ray.data.arrays import is_array, read_arrays
from cl_ray.data.conversion import Convert, DepthRange, to_pixels
from cl_ray.data.dataset import (
    INFO_FILE,
    PACKAGED,
    STACKED,
    Dataset,
    DatasetInfo,
    open_dataset_location,
)
from cl_ray.data.decoding import ENDINGS, FORMATS, JPEG_QUALITY
from cl_ray.data.file_tree import FileTree, Note, counted, ending, list_folder, tree_of_files
from cl_ray.data.image_folder import read_image_folder
from cl_ray.data.labels import find_label_files, read_label_files
from cl_ray.data.source_config import NO_LABELS, SourceConfig
from cl_ray.data.stacked_mnist import read_stacked_mnist
from cl_ray.data.torchvision_source import read_torchvision, torchvision_names
from cl_ray.data.writer import (
    ProgressCallback,
    RawImage,
    ReadImage,
    SourceSplits,
    check_output_free,
    write_splits,
)
from cl_ray.errors import UserError, first_error_line
from cl_ray.storage import open_filesystem, without_options

_GENERATED = {STACKED: read_stacked_mnist}
"""Readers of the sources that are made by name; these alone, and all of them, read --count and
--test-count."""
_FSSPEC = ("hf://", "fsspec+")
"""Beginnings of URIs that are read by libraries which raise errors of their own."""


def write_dataset(
    config: SourceConfig, progress: ProgressCallback | None = None, note: Note = print
) -> DatasetInfo:
    """Make a dataset of the images of a source.

    Args:
        config: The source, the target and the conversion.
        progress: Called now and then with the stage and the number of images done.
        note: Called with a sentence on what is left out of the source.

    Raises:
        UserError: The source cannot be found or read, its images do not fit together or need an
            option, or `out` exists or cannot be written. Then there is no new dataset, and a
            local `out` is unchanged.
    """
    check_output_free(config.out, config.overwrite)  # before a download
    dropped, kept = Counter[str](), Counter[str]()

    def chosen(split: str, images: Iterable[ReadImage]) -> Iterator[ReadImage]:
        for image in images:
            if isinstance(image, RawImage):
                if config.label_column == NO_LABELS:
                    image = replace(image, label=None)
                if config.unlabelled == "drop" and image.label is None:
                    dropped[split] += 1
                    continue
                kept[split] += 1
            yield image
        if dropped[split] and not kept[split]:
            raise UserError(
                f"`--unlabelled drop` leaves no image in the split {split}, as none has a label: "
                "leave the flag out, or move the split away."
            )

    with warnings.catch_warnings(), _library_errors(config.source):
        warnings.filterwarnings("ignore", module="PIL")  # damaged metadata, unusual sizes
        depth = _measure_depth(config, progress, note) if config.scale_depth else None
        convert = partial(to_pixels, config=config, depth=depth)
        splits, metadata = read_source(config, convert, note)
        info = write_splits(
            {split: chosen(split, images) for split, images in splits.items()},
            config.out,
            replace(
                metadata,
                name=os.path.basename(open_filesystem(config.out)[1]),
                licence=config.licence or metadata.licence,
                classes=None if config.label_column == NO_LABELS else metadata.classes,
            ),
            validation_fraction=config.validation_fraction,
            test_fraction=config.test_fraction,
            seed=config.seed,
            overwrite=config.overwrite,
            skip_broken=config.skip_broken,
            encoding=config.encoding,
            quality=config.quality or JPEG_QUALITY,
            progress=progress,
            note=note,
        )
    if dropped:
        note(f"Left out, having no label: {counted(dropped)}.")
    return info


@contextmanager
def _library_errors(source: str) -> Iterator[None]:
    """Turn whatever fsspec's libraries raise into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not source.startswith(_FSSPEC):
            raise
        raise UserError(
            f"{source} cannot be read ({type(error).__name__}: {first_error_line(error)}): check "
            "its name, the network and HF_TOKEN, or download it and give the folder."
        ) from error


def _measure_depth(
    config: SourceConfig, progress: ProgressCallback | None, note: Note
) -> DepthRange:
    """Read all images for the range of their pixels."""
    depth = DepthRange()
    splits, _ = read_source(config, depth.add, lambda _: None)
    for split, images in splits.items():
        count = sum(isinstance(image, RawImage) for image in images)
        if progress:
            progress(f"measuring {split}", count, count)
    depth.check()
    note(f"The pixels {depth.low:g} to {depth.high:g} are mapped to 0 to 255.")
    return depth


def read_source(config: SourceConfig, convert: Convert, note: Note) -> SourceSplits:
    """Find the source that `config.source` names; its images are read lazily.

    Raises:
        UserError: It is neither a known name nor a readable folder with images.
    """
    source = config.source
    if source in _GENERATED:
        return _GENERATED[source](config, convert)
    if config.count or config.test_count:
        raise UserError(
            "--count and --test-count are the numbers of images that "
            f"{' or '.join(_GENERATED)} makes; the number of images of {source} is fixed: leave "
            "them out."
        )
    bare = "/" not in source and source not in (".", "..", PACKAGED)
    # Names of classes have capitals; for another folder that is there, torch need not be imported.
    names = torchvision_names() if bare and (source[0].isupper() or not exists(source)) else {}
    if source in names:
        return read_torchvision(source, names[source], config, convert)
    filesystem, path = open_dataset_location(source)
    try:
        info = filesystem.get_file_info(path)
    except OSError as error:
        raise UserError(f"{source} cannot be read: {first_error_line(error)}.") from error
    if info.type == pafs.FileType.NotFound and bare:
        lower = {name.lower(): name for name in (*_GENERATED, *names)}
        close = difflib.get_close_matches(source.lower(), lower, 3, 0.5)
        hint = f" (closest: {', '.join(lower[name] for name in close)})" if close else ""
        raise UserError(
            f"{source} is neither a folder nor a dataset of torchvision's{hint}: give a folder, "
            f"or one of {', '.join([*_GENERATED, *names])}."
        )
    if info.type == pafs.FileType.NotFound:
        raise UserError(f"{source} does not exist: give a folder or the name of a dataset.")
    location = without_options(source)
    if info.type == pafs.FileType.Directory:
        return _read_files(config, list_folder(location, filesystem, path, note), convert, note)
    path, _, name = path.rpartition("/")
    folder = location.rpartition("/")[0] or ("/" if location.startswith("/") else ".")
    tree = tree_of_files(folder, filesystem, path, {name: info.size})
    splits, metadata = _read_files(config, tree, convert, note)
    return splits, replace(metadata, source=location)


def _read_files(config: SourceConfig, tree: FileTree, convert: Convert, note: Note) -> SourceSplits:
    """Read images of files of one kind: images, arrays, archives of these, or Parquet."""
    kinds = _files_by_kind(tree, config.image_column)
    if kinds["archive"]:
        tree = open_archives(tree, kinds["archive"], config, note)
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
    if parquet:
        # pyarrow.compute, which takes a tenth of a second, is needed here alone.
        from cl_ray.data.parquet_source import read_parquet_source

        info = Dataset.open(config.source).info if own else None
        return read_parquet_source(tree, parquet, config, convert, info, note)
    if arrays:
        return read_arrays(tree, arrays, config, convert, note)
    labels = read_label_files(tree, tables, images, config, note) if with_labels else {}
    return read_image_folder(tree, images, config, convert, labels, note)


def _files_by_kind(tree: FileTree, image_column: str | None) -> dict[str, list[str]]:
    """Return the files that can be read, by their kind, of which there is one."""
    kinds = {
        "image": [file for file in tree.sizes if ending(file) in ENDINGS],
        "archive": [file for file in tree.sizes if is_archive(file)],
        "parquet": [file for file in tree.sizes if ending(file) == ".parquet"],
        "array": [file for file in tree.sizes if is_array(file)],
    }
    found = {kind: files[0] for kind, files in kinds.items() if files}
    if len(found) > 1 and not (found.keys() == {"image", "parquet"} and image_column):
        first, second, *_ = found.values()
        way_out = "give a folder with one of the two"
        if "parquet" in found:
            way_out += (
                ", or name the Parquet column of the images, or of their paths, with "
                "`--image-column`"
            )
        raise UserError(f"{tree.location} holds both {first} and {second}: {way_out}.")
    return kinds
