"""Stacked MNIST: three packaged digits as the channels of an image, 1000 classes.

The dataset by which mode collapse is measured (Metz et al., 2017, Unrolled GAN, section 3.3.1;
Srivastava et al., 2017, VEEGAN; Lin et al., 2018, PacGAN).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cl_ray.data.conversion import Convert
from cl_ray.data.dataset import (
    PACKAGED,
    STACKED,
    STACKED_COUNTS,
    STACKED_SOURCE,
    Dataset,
    DatasetInfo,
    RowBatch,
)
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.writer import DatasetMetadata, RawImage, SourceSplits

STACKED_MODES = 1000
STACKED_SHAPE = (28, 28, 3)

_STREAMS = {"train": 0, "test": 1, "validation": 2}


def sample_triples(split: str, count: int, seed: int) -> NDArray[np.int64]:
    """Sample the digits of each image; a pure function, so that an image's id determines them.

    Args:
        split: `train`, `validation` or `test`; digits are of that split of the packaged data.
        count: Number of images. A larger count only appends images.
        seed: The random seed.

    Returns:
        [count, 3], places in `load_digits(split)` of the digits in red, green and blue of each
        image, drawn uniformly with replacement.
    """
    digits = Dataset.open(PACKAGED).info.splits[split].rows
    random = np.random.default_rng([seed, _STREAMS[split]])
    return random.integers(0, digits, (count, 3))


def mode_labels(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Return the labels 100 a + 10 b + c, [...], of digits [..., 3] in red, green and blue."""
    return labels @ np.array([100, 10, 1])


def load_digits(split: str) -> RowBatch:
    """Load all packaged digits of a split, labelled, sorted by their ids."""
    return Dataset.open(PACKAGED).read(split).sorted_by_id()


def read_stacked_mnist(config: SourceConfig, convert: Convert) -> SourceSplits:
    """Stack the digits that `sample_triples` draws; each image is made lazily."""
    given = {"train": config.count, "validation": config.test_count, "test": config.test_count}
    counts = {split: given[split] or count for split, count in STACKED_COUNTS.items()}
    packaged = Dataset.open(PACKAGED).info
    return (
        {split: _images(split, count, config.seed, convert) for split, count in counts.items()},
        DatasetMetadata(
            name=STACKED,
            source=f"{STACKED_SOURCE}, seed {config.seed}: {packaged.source}",
            licence=packaged.licence,
            classes=[f"{mode:03}" for mode in range(STACKED_MODES)],
        ),
    )


def is_stacked_mnist(info: DatasetInfo) -> bool:
    """Return whether a dataset is Stacked MNIST with images in their original size and colours."""
    return info.source.startswith(STACKED_SOURCE) and info.shape == STACKED_SHAPE


def _images(split: str, count: int, seed: int, convert: Convert) -> Iterator[RawImage]:
    rows = load_digits(split)
    assert rows.label is not None
    for index, chosen in enumerate(sample_triples(split, count, seed)):
        name = f"{STACKED} {split} {index}"
        image = np.concatenate(list(rows.image[chosen]), axis=2)
        label = int(mode_labels(rows.label[chosen]))
        yield RawImage(convert(Image.fromarray(image), name), label, name)
