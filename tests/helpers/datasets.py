"""Datasets of given images, written as Parquet shards."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from cl_ray.data.dataset import Dataset, RowBatch
from cl_ray.data.decoding import Encoding
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits

Split = tuple[np.ndarray, Iterable[Any]]


def write_images(
    folder: Path,
    classes: list[str] | None = None,
    encoding: Encoding | None = None,
    **splits: Split,
) -> str:
    """Write a dataset named like its folder; each split is images and their labels or Nones."""
    images = {
        split: [
            RawImage(image, None if label is None else int(label), "image")
            for image, label in zip(*pairs, strict=True)
        ]
        for split, pairs in splits.items()
    }
    metadata = DatasetMetadata(folder.name, "a test", classes=classes)
    write_splits(images, str(folder), metadata, encoding=encoding)
    return str(folder)


def mnist(split: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first packaged digits of a split and their labels."""
    data = Dataset.open("mnist")
    rows = data.read(split, data.row_groups(split)[: 1 + count // data.info.row_group])
    return rows.image[:count], labels_of(rows)[:count]


def labels_of(rows: RowBatch) -> np.ndarray:
    """Return the labels of rows that must have some."""
    assert rows.label is not None
    return rows.label
