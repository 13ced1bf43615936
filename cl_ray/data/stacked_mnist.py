"""Stacked MNIST: three packaged digits as the three colours of an image, 1000 classes.

The data set by which mode collapse is measured (Metz et al., 2017, Unrolled GAN, section 3.3.1;
Srivastava et al., 2017, VEEGAN; Lin et al., 2018, PacGAN).
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cl_ray.data.dataset import PACKAGED, STACKED, Dataset, DatasetInfo, RowBatch
from cl_ray.data.image_ops import Convert
from cl_ray.data.writer import DatasetMetadata, RawImage, SourceSplits

COUNTS = {"train": 60_000, "test": 10_000}
"""Images of each split unless it is said otherwise."""
STACKED_MODES = 1000
SHAPE = (28, 28, 3)
SOURCE = "Stacked MNIST (Metz et al., 2017) of the packaged digits"
"""How `source` in dataset.json begins; the seed follows."""
STREAMS = {"train": 0, "test": 1}


def sample_triples(split: str, count: int, seed: int) -> NDArray[np.int64]:
    """Which digits lie in which image: a pure function, so that ids tell it.

    Args:
        split: `train` or `test`; digits are of the same split of the packaged data.
        count: Images.
        seed: Everything follows from it. A larger count only adds images at the end.

    Returns:
        [count, 3], ids of the packaged digits in red, green and blue of the image of that id, each
        drawn uniformly and with repetition.
    """
    digits = Dataset.open(PACKAGED).info.splits[split].rows
    random = np.random.default_rng([seed, STREAMS[split]])
    return random.integers(0, digits, (count, 3))


def mode_labels(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """The label 100 a + 10 b + c, [...], of the digits [..., 3] in red, green and blue."""
    return labels @ np.array([100, 10, 1])


def load_digits(split: str) -> RowBatch:
    """All packaged digits of a split, labelled, in the order of their ids, which is 0, 1, 2, …"""
    rows = Dataset.open(PACKAGED).read(split)
    order = np.argsort(rows.id)
    label = None if rows.label is None else rows.label[order]
    return RowBatch(rows.id[order], rows.image[order], label)


def read_stacked_mnist(counts: dict[str, int], seed: int, convert: Convert) -> SourceSplits:
    """Stacks digits; each image is made when it is asked for.

    Args:
        counts: Images of `train` and `test`.
        seed: Decides which digits, see `triples`.
        convert: Makes pixels of an image.
    """
    packaged = Dataset.open(PACKAGED).info
    return (
        {split: _pictures(split, count, seed, convert) for split, count in counts.items()},
        DatasetMetadata(
            name=STACKED,
            source=f"{SOURCE}, seed {seed}: {packaged.source}",
            licence=packaged.licence,
            classes=[f"{mode:03}" for mode in range(STACKED_MODES)],
        ),
    )


def is_stacked_mnist(info: DatasetInfo) -> bool:
    """Whether a data set is one of these, images in their own size and colours."""
    return info.source.startswith(SOURCE) and info.shape == SHAPE


def _pictures(split: str, count: int, seed: int, convert: Convert) -> Iterator[RawImage]:
    rows = load_digits(split)
    assert rows.label is not None
    for number, chosen in enumerate(sample_triples(split, count, seed)):
        at = f"{STACKED} {split} {number}"
        image = np.concatenate(list(rows.image[chosen]), axis=2)
        label = int(mode_labels(rows.label[chosen]))
        yield RawImage(convert(Image.fromarray(image), at), label, at)
