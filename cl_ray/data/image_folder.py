"""A folder of image files → pictures."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs as pafs

from cl_ray.data.dataset import first_error_line, without_secrets
from cl_ray.data.image_ops import Convert, decode
from cl_ray.data.writer import SPLIT_NAMES, DatasetMetadata, RawImage, SourceSplits
from cl_ray.errors import UserError

THREADS = 8
AT_A_TIME = 256


def read_image_folder(
    location: str, filesystem: pafs.FileSystem, path: str, files: list[str], convert: Convert
) -> SourceSplits:
    """Finds splits and classes in the paths of image files; reads none yet.

    A folder `train` on top makes the folders on top the splits. The next folder is the class, and
    whatever lies deeper belongs to it; without folders there are no labels.

    Args:
        location: what the user called the folder.
        filesystem: where it is.
        path: where on that filesystem.
        files: the image files in it, relative to it and sorted.
        convert: makes pixels of an image.

    Raises:
        UserError: if what lies beside `train` is no split, or images lie beside class folders.
    """
    has_splits = any(file.startswith("train/") for file in files)
    splits: dict[str, list[tuple[str, str | None]]] = {}
    for file in files:
        folders = file.split("/")[:-1]
        split = "train"
        if has_splits:
            if not folders or folders[0] not in SPLIT_NAMES:
                raise UserError(
                    f"{location} has a folder train, so its folders are splits "
                    f"({', '.join(SPLIT_NAMES)}), but {file} is in none: move it into one."
                )
            split = SPLIT_NAMES[folders.pop(0)]
        splits.setdefault(split, []).append((file, folders[0] if folders else None))
    everything = [pair for pairs in splits.values() for pair in pairs]
    classes = sorted({name for _, name in everything if name is not None})
    loose = next((file for file, name in everything if name is None), None)
    if classes and loose is not None:
        raise UserError(
            f"{location} has class folders ({classes[0]}), but {loose} is in none: move it."
        )
    number = {name: label for label, name in enumerate(classes)}

    def load(pair: tuple[str, str | None]) -> RawImage:
        file, name = pair
        where = f"{location}/{file}"
        try:
            with filesystem.open_input_stream(f"{path}/{file}") as stream:
                data = stream.read()
        except OSError as error:
            raise UserError(f"{where} cannot be read: {first_error_line(error)}.") from error
        return RawImage(convert(decode(data, where), where), number[name] if name else None, where)

    def pictures(pairs: list[tuple[str, str | None]]) -> Iterator[RawImage]:
        # Threads hide the wait for a far filesystem; a few hundred at a time bound the memory.
        with ThreadPoolExecutor(THREADS) as pool:
            for start in range(0, len(pairs), AT_A_TIME):
                yield from pool.map(load, pairs[start : start + AT_A_TIME])

    return (
        {split: pictures(pairs) for split, pairs in splits.items()},
        DatasetMetadata(name=location, source=without_secrets(location), classes=classes or None),
    )
