"""Labels of all training images from few: they spread over a run's representation.

The labelled images and others, 60,000 in all at most, form a graph of nearest neighbours, on which
the labels spread (`NeighbourGraph`: Zhou et al., 2004). Other images take those of their neighbours
in it.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from cl_ray.data.dataset import UNLABELLED, Dataset
from cl_ray.data.partition import TRAIN_SPLIT, draw_labelled_rows
from cl_ray.data.writer import DatasetMetadata, ProgressCallback, RawImage, write_splits
from cl_ray.errors import UserError
from cl_ray.evaluation.probes import NeighbourGraph, PrincipalComponents, graph_rows
from cl_ray.evaluation.reference import check_finite

_LABELLED = 30_000
"""Labelled images from which labels spread, at most."""
_BLOCK_BYTES = 2**26
"""Pixels that are read and embedded at once, at most."""

Embed = Callable[[NDArray[np.uint8]], NDArray[np.float32]]
"""Computes features [n, d] of images [n, H, W, C]."""


class PredictedLabels(NamedTuple):
    """Labels of the n rows of a split, in its order.

    Args:
        label: int64 [n], UNLABELLED where no label reaches.
        confidence: float32 [n], the part of the predicted class in [0, 1]; 1 of given labels.
    """

    label: NDArray[np.int64]
    confidence: NDArray[np.float32]


def predict_labels(
    embed: Embed, dataset: Dataset, given: NDArray[np.int64], progress: ProgressCallback
) -> PredictedLabels:
    """Predict the labels of the training images that have none.

    Args:
        embed: Computes the features whose neighbours are found.
        dataset: The images.
        given: int64 [n], the label of each row of the split train, in its order; UNLABELLED where
            it is to be predicted.
        progress: Is told how many images are embedded.

    Raises:
        UserError: No label is given, or a feature is NaN or Inf.
    """
    labelled = np.flatnonzero(given != UNLABELLED)
    if len(labelled) > _LABELLED:  # the graph needs unlabelled images, too
        labelled = np.sort(draw_labelled_rows(given, _LABELLED, seed=0))
    if not len(labelled):
        raise UserError(f"No training image of {dataset.location} has a label: label some.")
    label = np.full(len(given), UNLABELLED)
    confidence = np.zeros(len(given), np.float32)

    def report(done: int) -> None:
        progress("embedding", done, len(given))

    def keep(rows: NDArray[np.int64], parts: NDArray[np.float32]) -> None:
        confidence[rows] = parts.max(1)
        label[rows] = np.where(confidence[rows] > 0, parts.argmax(1), UNLABELLED)

    rows = graph_rows(labelled, len(given))
    order = rows.argsort()
    blocks = _features_in_blocks(embed, dataset, rows[order], report)
    features = np.concatenate([found for _, found in blocks])[order.argsort()]
    components = PrincipalComponents(features)
    graph = NeighbourGraph(components.project(features))
    parts = graph.spread(np.arange(len(labelled)), given[labelled], int(given.max()) + 1)
    keep(rows, parts)
    others = np.setdiff1d(np.arange(len(given)), rows)
    for block, features in _features_in_blocks(
        embed, dataset, others, lambda done: report(len(rows) + done)
    ):
        neighbours = graph.neighbours(components.project(features))
        keep(block, np.mean([parts[column] for column in neighbours.T], axis=0))
    known = given != UNLABELLED
    label[known], confidence[known] = given[known], 1
    return PredictedLabels(label, confidence)


def write_with_labels(
    dataset: Dataset,
    labels: NDArray[np.int64],
    how: str,
    out: str,
    *,
    overwrite: bool = False,
    progress: ProgressCallback | None = None,
) -> None:
    """Write a copy of a dataset with other labels of its training images.

    JPEG images are encoded again; other encodings are lossless.

    Args:
        dataset: The images.
        labels: int64 [n], of the rows of the split train in its order; UNLABELLED for none.
        how: How they were predicted, in words.
        out: Folder or URI.
        overwrite: Replace the dataset that is at `out`.
        progress: See `ProgressCallback`.

    Raises:
        UserError: `out` exists or cannot be written.
    """
    info = dataset.info

    def images(split: str) -> Iterator[RawImage]:
        first = 0
        for group in dataset.row_groups(split):
            rows = dataset.read(split, [group], origins=True)
            if split == TRAIN_SPLIT:
                rows = replace(rows, label=labels[first : first + len(rows.id)])
            first += len(rows.id)
            for row, number in enumerate(rows.id.tolist()):
                label = UNLABELLED if rows.label is None else int(rows.label[row])
                origin = None if rows.origin is None else rows.origin[row]
                known = None if label == UNLABELLED else label
                yield RawImage(rows.image[row], known, f"image {number}", number, origin)

    metadata = DatasetMetadata(
        info.name, info.source, info.licence, info.classes, predicted_labels=how
    )
    write_splits(
        {split: images(split) for split in info.splits}, out, metadata, overwrite=overwrite,
        keep_ids=True, encoding=info.encoding, progress=progress,
    )  # fmt: skip


def _features_in_blocks(
    embed: Embed, dataset: Dataset, rows: NDArray[np.int64], report: Callable[[int], None]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """Yield blocks of sorted rows of the split train, and their features."""
    groups, size = dataset.row_groups(TRAIN_SPLIT), _BLOCK_BYTES // int(np.prod(dataset.info.shape))
    for first in range(0, len(rows), size):
        block = rows[first : first + size]
        ranges = [groups.rows(row, row + 1)[0] for row in block.tolist()]
        features = embed(dataset.read(TRAIN_SPLIT, ranges).image)
        check_finite(features, "training image")
        report(first + len(block))
        yield block, features
