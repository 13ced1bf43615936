"""Images to make data sets of, and what is read of those."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from cl_ray.data.dataset import Dataset, DatasetInfo, RowBatch

Make = Callable[..., tuple[DatasetInfo, RowBatch]]


def pixels(count: int, *shape: int) -> np.ndarray:
    random = np.random.default_rng(count)
    return random.integers(0, 256, (count, *(shape or (28, 28))), dtype=np.uint8)


def save(path: Path, array: np.ndarray, mode: str | None = None, **options: Any) -> np.ndarray:
    """Saves an image, in the given mode, and returns the array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path, **options)
    return array


def in_order(data: Dataset, split: str = "train") -> RowBatch:
    rows = data.read(split)
    order = np.argsort(rows.id)
    assert np.array_equal(rows.id[order], np.arange(len(order)))
    label = None if rows.label is None else rows.label[order]
    return RowBatch(rows.id[order], rows.image[order], label)
