"""Metrics of generated images: distances, manifolds, labels and modes.

Distances and manifolds are functions of two sets of features (see `reference.py`). torchmetrics is
imported where it is used: it takes seconds.
"""

import warnings
from collections.abc import Iterator
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_ray.data.config import ViewConfig
from cl_ray.data.dataset import UNLABELLED, RowBatch
from cl_ray.data.stacked_mnist import STACKED_MODES, load_digits
from cl_ray.evaluation.classifier import (
    ClassifierConfig,
    Floats,
    Labels,
    Pixels,
    classifier_outputs,
    fitting_stride,
    train_classifier,
)
from cl_ray.evaluation.config import MANIFOLD_NEIGHBOURS
from cl_ray.evaluation.reference import (
    Reference,
    ReferenceClassifier,
    StackedReference,
    check_finite,
)

_SUBSETS, _SUBSET_SIZE = 100, 1000
"""The kernel distance is the mean over so many subsets of at most so many rows."""
_BLOCK_ROWS = 1000
"""Rows whose distances to all others are in memory at once: 80 MB of float64 for 10,000."""
_SINGLE_PROCESS: dict[str, Any] = {"sync_on_compute": False}
"""Only rank 0 evaluates: torchmetrics must not wait for the other ranks."""
_NO_VIEWS = ViewConfig(rotate=0, shift=0, scale=0, shear=0, warp=0, erase=0)
"""Augmentation would make up for variety that the images lack."""


class Samples:
    """Images to be measured, with what several metrics share, each computed once.

    Args:
        images: uint8 [N, H, W, C]: generated images, or real ones for the baseline.
        labels: int64 [N], the classes that the images were generated as, or their labels; None if
            there are none.
        order: Rows of `images` in random order, for metrics over random subsets.
        real_features: float32 [M, d], reference features of held-out real images.
        held_out: Held-out real images: their pixels, and the labels that a classifier is scored on.
        reference: Computes features, and labels if it is a classifier.
        seed: Seed of random subsets.
    """

    def __init__(
        self,
        images: Pixels,
        labels: Labels | None,
        order: NDArray[np.int64],
        real_features: Floats,
        held_out: RowBatch,
        reference: Reference,
        seed: int,
    ):
        self.images, self.labels, self.order = images, labels, order
        self.real_features, self.held_out = real_features, held_out
        self.reference, self.seed = reference, seed

    @cached_property
    def features(self) -> Floats:
        """Reference features, float32 [N, d], in random order."""
        features = self.reference.features(self.images[self.order])
        for kind, checked in {"real": self.real_features, "generated": features}.items():
            check_finite(checked, f"the {kind} image")
        return features

    @cached_property
    def manifolds(self) -> dict[str, float]:
        """See `manifold_metrics`."""
        return manifold_metrics(self.real_features, self.features)

    @cached_property
    def predicted(self) -> Labels:
        """The reference's labels, int64 [N], in the order of `images`."""
        assert isinstance(self.reference, ReferenceClassifier | StackedReference)
        predicted = np.empty(len(self.images), np.int64)
        predicted[self.order] = self.reference.labels(self.features)
        return predicted

    @cached_property
    def histogram(self) -> NDArray[np.int64]:
        """How often the reference predicts each class, int64 [classes]."""
        assert isinstance(self.reference, ReferenceClassifier | StackedReference)
        return np.bincount(self.predicted, minlength=self.reference.classes)

    @cached_property
    def real_classes(self) -> Labels:
        """The classes that the reference predicts for the held-out real images."""
        assert isinstance(self.reference, ReferenceClassifier | StackedReference)
        return np.unique(self.reference.labels(self.real_features))


class _Identity(nn.Module):
    """Stands where torchmetrics expects a network: its inputs are features already."""

    def __init__(self, dimensions: int):
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Floats, fake: Floats) -> float:
    """Compute the Fréchet distance of features [N, d] and [M, d] (Heusel et al., 2017, eq. 6).

    |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), as usual the square of the distance of the two
    Gaussians, 0 if equal. It depends on N and M: compare like with like. Over Inception's features
    it is known as FID, and over no others.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Identity(real.shape[1]), **_SINGLE_PROCESS)
    metric.update(_double(real), real=True)
    metric.update(_double(fake), real=False)
    return max(float(metric.compute()), 0.0)  # rounding may leave less than 0


def kernel_distance(real: Floats, fake: Floats, seed: int = 0) -> float:
    """Compute the kernel distance of features [N, d] and [M, d], unbiased.

    KID (Binkowski et al., 2018, section 3): the squared maximum mean discrepancy under the kernel
    (x.y / d + 1)^3, the mean over random subsets. Its expectation is 0 for equal distributions, so
    it may be a little below 0, and its baseline is noise around 0: take no ratio to it.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(_SUBSET_SIZE, len(real), len(fake))
    subsets = 1 if size == len(real) == len(fake) else _SUBSETS  # each would be the whole set
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, as is meant
        metric = KernelInceptionDistance(
            _Identity(real.shape[1]), subsets=subsets, subset_size=size, **_SINGLE_PROCESS
        )
        metric.update(_double(real), real=True)
        metric.update(_double(fake), real=False)
        torch.manual_seed(seed)
        mean, _ = metric.compute()
    return float(mean)


def manifold_metrics(real: Floats, fake: Floats, k: int = MANIFOLD_NEIGHBOURS) -> dict[str, float]:
    """Compute precision, recall, density and coverage.

    A set's manifold is the union of balls around its samples, each as wide as the distance to the
    sample's k-th nearest neighbour in the set. Not by `prdc`, which is this in float64 with whole
    matrices of distances: at 10,000 images each 2.4 GB, here 80 MB.

    Args:
        real: [N, d], N > k.
        fake: [M, d], M > k.
        k: Which nearest neighbour bounds a ball.

    Returns:
        `precision`: fraction of fakes in the manifold of the real (Kynkäänniemi et al., 2019,
        eq. 2); `recall`: fraction of real samples in the manifold of the fakes (the same);
        `density`: mean number of real balls that a fake lies in, over k (Naeem et al., 2020);
        `coverage`: fraction of real balls with a fake in them (the same, section 3).
    """
    reals, fakes = _double(real), _double(fake)
    radii_real, radii_fake = _radii(reals, k), _radii(fakes, k)
    balls = torch.zeros(len(fakes), dtype=torch.long)  # real balls that each fake lies in
    recalled = covered = 0
    for rows, distances in _distance_blocks(reals, fakes):
        inside = distances <= radii_real[rows, None]
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distances <= radii_fake).any(1).sum())
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": recalled / len(reals),
        "density": float(balls.double().mean()) / k,
        "coverage": covered / len(reals),
    }


def _radii(samples: Tensor, k: int) -> Tensor:
    """Return the distance [N] of each sample to its k-th nearest neighbour."""
    blocks = _distance_blocks(samples, samples)
    return torch.cat([block.topk(k + 1, dim=1, largest=False).values[:, k] for _, block in blocks])


def _distance_blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield Euclidean distances, a block of rows at a time."""
    for start in range(0, len(rows), _BLOCK_ROWS):
        block = slice(start, start + _BLOCK_ROWS)
        yield block, torch.cdist(rows[block], columns)


def label_entropy(histogram: NDArray[np.int64]) -> float:
    """Compute the entropy of a histogram over classes [K] in nats, 0 to log K."""
    fractions = histogram[histogram > 0] / histogram.sum()
    return float(-(fractions * np.log(fractions)).sum()) + 0.0  # no -0.0


def label_balance(histogram: NDArray[np.int64], classes: Labels) -> float:
    """Compute the count of the rarest of `classes` over that of the commonest class, 0 to 1."""
    return float(histogram[classes].min() / histogram.max())


def class_accuracy(samples: Samples) -> float:
    """Compute the fraction of images that the reference gives the class they were generated as.

    Of real images, those with a label count.
    """
    assert samples.labels is not None
    known = samples.labels != UNLABELLED
    return float((samples.predicted == samples.labels)[known].mean())


def classification_accuracy_score(
    samples: Samples, config: ClassifierConfig | None = None
) -> float:
    """Train a classifier on samples and score it on real images (CAS: Ravuri and Vinyals, 2019).

    The samples' labels are the classes that they were generated as, or else the reference's, as
    are those of real images without a label. The default config takes twenty seconds of one core
    for 10,000 digits. Returns the accuracy on the labelled held-out images, 0 to 1.
    """
    assert isinstance(samples.reference, ReferenceClassifier)
    labels = samples.labels
    if labels is None or (labels == UNLABELLED).any():
        known = samples.predicted if labels is None else labels
        labels = np.where(known == UNLABELLED, samples.predicted, known)
    config = config or ClassifierConfig(
        width=16,
        features=64,
        stride=fitting_stride(samples.images.shape[1]),
        epochs=6,
        lr=0.05,
        views=_NO_VIEWS,
    )
    held_out = samples.held_out.labelled()
    network = train_classifier(samples.images, labels, samples.reference.classes, config)
    predicted = classifier_outputs(network, held_out.image).argmax(1)
    return float((predicted == held_out.label).mean())


def mode_kl(histogram: NDArray[np.int64], expected: NDArray[np.float64]) -> float:
    """Compute KL(p || q) of a histogram [K] of samples over modes from `expected` q [K], in nats.

    0 if equal, log K if all samples are of one of K equally frequent modes. Of N samples of q
    itself it is about (K - 1) / 2N, for N well above K.

    Args:
        histogram: How many samples are of each mode.
        expected: The modes' fractions, none of them 0; their sum is 1.
    """
    found = histogram > 0
    fractions = histogram[found] / histogram.sum()
    return max(float((fractions * np.log(fractions / expected[found])).sum()), 0.0)


@cache
def expected_mode_fractions() -> NDArray[np.float64]:
    """Return the probability of each mode of stacked training digits, float64 [1000].

    The product of its digits' frequencies, which are not quite a tenth. The counts of a finite data
    set would add their own noise, and may be 0.
    """
    labels = load_digits("train").label
    assert labels is not None
    fractions = np.bincount(labels, minlength=10) / len(labels)
    return np.einsum("a,b,c->abc", fractions, fractions, fractions).reshape(STACKED_MODES)


def _double(features: Floats) -> Tensor:
    return torch.from_numpy(np.asarray(features, np.float64))
