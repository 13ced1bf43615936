"""Random images, image files and small datasets for the tests of the data."""

from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cl_ray.data.dataset import Dataset, DatasetInfo, RowBatch
from cl_ray.data.writer import DatasetMetadata, RawImage

WriteSource = Callable[..., tuple[DatasetInfo, RowBatch]]
Refused = Callable[..., str]
METADATA = DatasetMetadata(name="tiny", source="a test", licence="CC0")


def pixels(count: int, *shape: int) -> np.ndarray:
    """Random pixels [count, *shape], 28 x 28 by default."""
    random = np.random.default_rng(count)
    return random.integers(0, 256, (count, *(shape or (28, 28))), dtype=np.uint8)


def images(count: int, side: int = 28, channels: int = 1) -> np.ndarray:
    """Random pixels [count, side, side, channels]."""
    return pixels(count, side, side, channels)


def smooth_images(count: int, side: int) -> np.ndarray:
    """Random smooth images [count, side, side, 3], of which JPEG keeps most."""
    small = [Image.fromarray(image) for image in pixels(count, 4, 4, 3)]
    return np.stack([np.asarray(i.resize((side, side), Image.Resampling.BICUBIC)) for i in small])


def colour_noise(count: int, side: int = 32, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Noise of three colours, [count, side, side, 3], whose numbers are the labels."""
    random, labels = np.random.default_rng(seed), np.arange(count) % 3
    images = random.integers(0, 128, (count, side, side, 3)).astype(np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[..., label] += 100
    return images, labels


def raw_images(array: np.ndarray, labelled: bool = False) -> Iterator[RawImage]:
    """Images [n, H, W, C] as a source yields them, of three classes."""
    for index, image in enumerate(array):
        yield RawImage(image, index % 3 if labelled else None, f"image {index}")


def png(array: np.ndarray) -> bytes:
    """The PNG file of an image."""
    stream = BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> np.ndarray:
    """Save an image, in the given mode, and return the array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return array


def read_sorted(data: Dataset, split: str = "train") -> RowBatch:
    """Read a split in the source's order."""
    rows = data.read(split).sorted_by_id()
    assert len(np.unique(rows.id)) == len(rows.id)
    return rows


def rows_by_split(info: DatasetInfo) -> dict[str, int]:
    return {name: split.rows for name, split in info.splits.items()}


def flip_byte(file: Path, offset: int) -> None:
    content = bytearray(file.read_bytes())
    content[offset] ^= 255
    file.write_bytes(content)
