"""Read a folder of image files.

`ray.data.read_images` does not replace this reader: it takes palette indices for pixels and
ignores EXIF rotation, transparency, further frames and 16-bit channels.
"""

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor

from cl_ray.data.conversion import Convert
from cl_ray.data.decoding import (
    BrokenImageError,
    MemoryBudget,
    decoder_errors,
    load_image,
    open_image,
)
from cl_ray.data.file_tree import FileTree, Note, listed
from cl_ray.data.labels import LabelValue, find_classes
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.splits import find_folder_splits
from cl_ray.data.writer import DatasetMetadata, RawImage, ReadImage, SourceSplits
from cl_ray.errors import UserError

_CHUNK = 256
"""Images that are read at once, at most."""
SplitFiles = dict[str, list[tuple[str, str | None]]]
"""The image files of each split, with the folder of each that may be its class."""
_GROUP = 16
"""Images that a thread reads at a time: handing over each costs a tenth of decoding it."""


def read_image_folder(
    tree: FileTree,
    files: list[str],
    config: SourceConfig,
    convert: Convert,
    labels: Mapping[str, LabelValue] | None,
    note: Note,
) -> SourceSplits:
    """Find the splits and classes of a folder of image files, and read lazily.

    All images that are decoded at once have together no more pixels, or bytes in their files, than
    the largest one may have. `labels` are classes of files, in place of their folders; empty is no
    labels.

    Raises:
        UserError: As `find_folder_splits`, or images lie beside class folders.
    """
    found = find_folder_splits(tree, files, config.splits)
    entries = [entry for split in found.values() for entry in split]
    folders = sorted({name for _, name in entries if name is not None})
    outside = next((file for file, name in entries if name is None), None)
    if labels is not None:
        if labels and len(folders) > 1:
            note(f"Not used for labels: the folders ({listed(folders, 3)}).")
    elif folders and outside is not None:
        raise UserError(
            f"{tree.location} has class folders ({folders[0]}), but {outside} is in none: move "
            "it, or leave the labels out with `--label-column none`."
        )
    label_of: Mapping[str, LabelValue] = labels or {}
    if labels is None:
        label_of = dict(entry for split in _class_folders(found, note).values() for entry in split)
    classes, class_indices = find_classes(set(label_of.values()), "the labels", note)
    limits = config.limits
    bytes_read, pixels_decoded = MemoryBudget(limits.bytes), MemoryBudget(limits.pixels)

    def load(file: str) -> RawImage:
        name = f"{tree.location}/{file}"
        label = class_indices.get(label_of.get(file))
        limits.check_bytes(tree.sizes[file], name)
        with bytes_read.reserve(tree.sizes[file]):
            with decoder_errors(name):  # of a damaged archive
                data = tree.read(file)
            image = open_image(data, name, limits)
            with pixels_decoded.reserve(image.width * image.height):
                return RawImage(convert(load_image(image, name), name), label, name, origin=file)

    def load_or_report(file: str) -> ReadImage:
        try:
            return load(file)
        except BrokenImageError as error:
            return error

    def load_group(files: list[str]) -> list[ReadImage]:
        return [load_or_report(file) for file in files]

    def images(files: list[str]) -> Iterator[ReadImage]:
        with ThreadPoolExecutor(tree.threads) as pool:  # hides the latency of a remote filesystem
            for start in range(0, len(files), _CHUNK):
                chunk = files[start : start + _CHUNK]
                groups = (chunk[k : k + _GROUP] for k in range(0, len(chunk), _GROUP))
                for group in pool.map(load_group, groups):
                    yield from group

    return (
        {split: images([file for file, _ in entries]) for split, entries in found.items()},
        DatasetMetadata(name=tree.location, source=tree.location, classes=classes),
    )


def _class_folders(found: SplitFiles, note: Note) -> SplitFiles:
    """Return the files whose folder is a class, by split.

    The only folder of a held-out split is none if the training images have classes and not this
    one, as Tiny ImageNet's val/images.
    """
    trained = {name for _, name in found["train"]}
    classes = dict(found)
    for split, entries in found.items():
        names = {name for _, name in entries}
        if len(names) == 1 < len(trained) and not names & trained:
            note(
                f"Not used for labels: the folder {names.pop()} of the split {split}, which has no "
                "other and train has no such class."
            )
            del classes[split]
    return classes
