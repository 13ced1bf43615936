"""Novelty: how unlike the images that a run was trained on an image is.

Let r(x) be D's representation of an image (`Discriminator.representation`), u(x) = [r(x), r(G(x))]
that of the image and of its reconstruction, and μ and Σ the mean and the shrunk covariance (OAS:
Chen et al., 2010) of u over training images. The distance of an image is that of its whitened
features from the k-th nearest ones of a training image x_(k) (deep nearest neighbours: Sun et al.,
2022, section 3),

    w(x) = L⁻¹ (u(x) − μ),  L Lᵀ = Σ,  distance(x) = |w(x) − w(x_(k))|.

Whitening gives the directions in which training images hardly differ their weight, as the
Mahalanobis distance does (Lee et al., 2018, section 2.1), and so also to r(x) − r(G(x)), what G
cannot reconstruct; neighbours allow for several clusters.
The novelty is the distance as a percentile of the distances of n held-out images x'_j,

    novelty(x) = #{j: distance(x'_j) < distance(x)} / n,

uniform on [0, 1] for images like those. (1 + n (1 − novelty)) / (n + 1) is the p-value of a
conformal test that x is one of them (Bates et al., 2023, section 2).
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_ray.data.dataset import Dataset, RowBatch, sample_rows
from cl_ray.data.partition import TRAIN_SPLIT
from cl_ray.errors import UserError

HELD_OUT_SPLIT = "validation"
NEIGHBOUR = 5
"""k: the neighbour whose distance counts."""
_KNOWN, _HELD_OUT, _BYTES = 10_000, 5_000, 5 * 10**8
"""Training images and held-out images, and the bytes of the pixels of each, at most."""
_FRACTION = 0.2
"""Of the training images are held out of the comparison where there is no split for it."""
_BLOCK = 1024
"""Images whose distances to all training images, or float64 features, are in memory at once."""
_SEED = 0


class Novelty(NamedTuple):
    """Novelty of n images, float32.

    Args:
        novelty: Fraction of held-out images that are less novel, [n] in [0, 1].
        distance: Distance to the k-th nearest training image, [n]; orders those of novelty 1.
    """

    novelty: NDArray[np.float32]
    distance: NDArray[np.float32]


class NoveltyDetector:
    """Compares features with those of training images and of held-out ones.

    Args:
        train: Of training images, [N, d], N 1 or more.
        held_out: Of other images of their kind, [M, d], M 1 or more.
        device: Where distances are computed.
    """

    def __init__(self, train: Tensor, held_out: Tensor, device: torch.device | str = "cpu"):
        covariance = shrunk_covariance(train)
        covariance.diagonal().add_(1e-12)  # all images may be the same
        inverse = torch.linalg.inv(torch.linalg.cholesky(covariance))
        self._mean, self._whitening = train.mean(0).to(device), inverse.T.float().to(device)
        self._train = self._whiten(train)
        self._held_out = self._distances(held_out).sort().values

    def score(self, features: Tensor) -> Novelty:
        """Score images by their features [n, d]."""
        distance = self._distances(features)
        less_novel = torch.searchsorted(self._held_out, distance)
        return Novelty((less_novel / len(self._held_out)).numpy(), distance.numpy())

    def _whiten(self, features: Tensor) -> Tensor:
        return (features.to(self._mean) - self._mean) @ self._whitening

    def _distances(self, features: Tensor) -> Tensor:
        k = min(NEIGHBOUR, len(self._train))
        blocks = self._whiten(features).split(_BLOCK)
        nearest = [torch.cdist(x, self._train).topk(k, largest=False).values[:, -1] for x in blocks]
        return torch.cat(nearest).cpu()


def shrunk_covariance(features: Tensor) -> Tensor:
    """Compute the covariance of features [n, d], shrunk towards a multiple of the identity.

    Oracle approximating shrinkage (OAS: Chen et al., 2010, equation 23) as `sklearn.covariance.oas`
    computes it, whose product took 55 s of CPU time for [10,000, 2,944] against 3 s.

    Returns:
        float64 [d, d].
    """
    n, d = features.shape
    mean = features.double().mean(0)
    covariance = torch.zeros(d, d, dtype=torch.float64)
    for block in features.split(_BLOCK):
        centred = block.double() - mean
        covariance.addmm_(centred.T, centred, alpha=1 / n)
    square, scale = covariance.square().mean(), covariance.trace() / d
    spread = (n + 1) * (square - scale**2 / d)
    shrinkage = min(1.0, float((square + scale**2) / spread)) if spread > 0 else 1.0
    covariance.mul_(1 - shrinkage).diagonal().add_(shrinkage * scale)
    return covariance


def sample_known(dataset: Dataset) -> tuple[RowBatch, RowBatch]:
    """Draw the training images and the held-out images that others are compared with.

    Raises:
        UserError: The dataset has one training image and no split validation.
    """
    known, held_out, split = _known_counts(dataset)
    if split == HELD_OUT_SPLIT:
        return (
            sample_rows(dataset, TRAIN_SPLIT, known, _SEED),
            sample_rows(dataset, split, held_out, _SEED),
        )
    rows = sample_rows(dataset, TRAIN_SPLIT, known + held_out, _SEED)
    return rows.take(slice(known)), rows.take(slice(known, None))


def describe_known(dataset: Dataset) -> str:
    """Say which images of a dataset others are compared with.

    Raises:
        UserError: As `sample_known`.
    """
    known, held_out, split = _known_counts(dataset)
    text = (
        f"Novelty: compared with {known:,} of {dataset.info.splits[TRAIN_SPLIT].rows:,} training "
        f"images of {dataset.location}, as a percentile among {held_out:,} "
    )
    if split == HELD_OUT_SPLIT:
        return f"{text}images of its split validation."
    return (
        f"{text}other training images: it has no split validation. The run was trained on them, so "
        "new images seem more novel than they are."
    )


def _known_counts(dataset: Dataset) -> tuple[int, int, str]:
    """Return the numbers of training and of held-out images, and the split of the latter."""
    splits = dataset.info.splits
    affordable = max(2, _BYTES // math.prod(dataset.info.shape))
    available = min(splits[TRAIN_SPLIT].rows, _KNOWN, affordable)
    if HELD_OUT_SPLIT in splits:
        held_out = min(splits[HELD_OUT_SPLIT].rows, _HELD_OUT, affordable)
        return available, held_out, HELD_OUT_SPLIT
    if available < 2:
        raise UserError(
            f"{dataset.location} has no split validation and one training image: novelty needs "
            "more images to compare with."
        )
    held_out = math.ceil(_FRACTION * available)
    return available - held_out, held_out, TRAIN_SPLIT
