"""Small sets of random images."""

from collections.abc import Iterator

import numpy as np

from cl_ray.data.writer import DatasetMetadata, RawImage

ABOUT = DatasetMetadata(name="tiny", source="a test", licence="CC0")
BIG = 64  # 64 × 64 × 3: row groups of 85 rows


def images(count: int, side: int = 28, channels: int = 1, seed: int = 0) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, side, side, channels), dtype=np.uint8)


def pictures(pixels: np.ndarray, labels: bool = False) -> Iterator[RawImage]:
    for number, image in enumerate(pixels):
        yield RawImage(image, number % 3 if labels else None, f"image {number}")
