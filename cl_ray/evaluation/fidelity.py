"""How near generated images come to real ones: distances, manifolds and labels, over features.

All are functions of features, whoever computed them (`reference.py`). A `Judge` puts each
figure beside its floor: the same figure of real training images in the place of generated ones.
torchmetrics is imported where it is used: it takes seconds.
"""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cl_ray.data.config import ViewConfig
from cl_ray.errors import UserError
from cl_ray.evaluation.classifier import (
    ClassifierConfig,
    Floats,
    Labels,
    Pixels,
    classifier_outputs,
    train_classifier,
)
from cl_ray.evaluation.reference import FeatureExtractor, ReferenceClassifier, StackedReference

NEIGHBOURS = 5
"""k of precision, recall, density and coverage: Naeem et al. recommend 5 (section 4.3)."""
SUBSETS, SUBSET = 100, 1000
"""The kernel distance is the mean over so many subsets of at most so many rows."""
BLOCK = 1000
"""Rows whose distances to all others are in memory at once: 80 MB of float64 for 10,000."""
ALONE: dict[str, Any] = {"sync_on_compute": False}
"""Rank 0 measures by itself; torchmetrics would wait for the other ranks, which are not there."""


def compute_fidelity(
    real: Floats, fake: Floats, k: int = NEIGHBOURS, seed: int = 0
) -> dict[str, float]:
    """Every measure of two sets of features.

    Args:
        real: [N, d], of real images, N > k.
        fake: [M, d], of generated ones, M > k. Metrics depend on N and M: compare like with like.
        k: Which nearest neighbour bounds a sample's neighbourhood.
        seed: Of the kernel distance's subsets.

    Returns:
        `frechet` and `kernel`, 0 if alike; `precision`, `recall` and `coverage`, 0 to 1, and
        `density`, 0 and up: 1 (density: about 1) if alike.

    Raises:
        UserError: The features do not go together, are too few, or are not finite.
    """
    _check_features(real, fake, k)
    return {
        "frechet": frechet_distance(real, fake),
        "kernel": kernel_distance(real, fake, seed),
        **manifold_metrics(real, fake, k),
    }


class _Given(nn.Module):
    """Stands where torchmetrics expects a network: what it is given are features already."""

    def __init__(self, dimensions: int):
        super().__init__()
        self.num_features = dimensions

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Floats, fake: Floats) -> float:
    """Fréchet distance of two Gaussians (Dowson and Landau, 1982; Heusel et al., 2017, eq. 6).

    |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)), the square of the distance, as is the custom.
    Over Inception's features it is known as FID, and over no others.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(_Given(real.shape[1]), **ALONE)
    metric.update(_double(real), real=True)
    metric.update(_double(fake), real=False)
    return max(float(metric.compute()), 0.0)  # rounding may leave less than nothing


def kernel_distance(real: Floats, fake: Floats, seed: int = 0) -> float:
    """Kernel distance (Binkowski et al., 2018, section 3), unbiased: its expectation, alike, is 0.

    The squared maximum mean discrepancy under the kernel (x.y / d + 1)^3, the mean over random
    subsets. It may be a little below 0; its floor is noise around 0, so take no ratio to it.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(SUBSET, len(real), len(fake))
    subsets = 1 if size == len(real) == len(fake) else SUBSETS  # each would be the whole set
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps all features, as is meant
        metric = KernelInceptionDistance(
            _Given(real.shape[1]), subsets=subsets, subset_size=size, **ALONE
        )
        metric.update(_double(real), real=True)
        metric.update(_double(fake), real=False)
        torch.manual_seed(seed)
        mean, _ = metric.compute()
    return float(mean)


def manifold_metrics(real: Floats, fake: Floats, k: int = NEIGHBOURS) -> dict[str, float]:
    """Precision, recall, density and coverage.

    A set's manifold is the union of balls around its samples, each as wide as the distance to the
    sample's k-th nearest neighbour in the set.

    Returns:
        `precision`: share of fakes in the manifold of the real (Kynkäänniemi et al., 2019, eq. 2);
        `recall`: share of real samples in the manifold of the fakes (the same);
        `density`: mean number of real balls that a fake lies in, over k (Naeem et al., 2020);
        `coverage`: share of real balls with a fake in them (the same, section 3).
    """
    reals, fakes = _double(real), _double(fake)
    radii_real, radii_fake = _radii(reals, k), _radii(fakes, k)
    balls = torch.zeros(len(fakes), dtype=torch.long)  # real balls that each fake lies in
    recalled = covered = 0
    for rows, distance in _blocks(reals, fakes):
        inside = distance <= radii_real[rows, None]
        balls += inside.sum(0)
        covered += int(inside.any(1).sum())
        recalled += int((distance <= radii_fake).any(1).sum())
    return {
        "precision": float((balls > 0).double().mean()),
        "recall": recalled / len(reals),
        "density": float(balls.double().mean()) / k,
        "coverage": covered / len(reals),
    }


def _radii(samples: Tensor, k: int) -> Tensor:
    """Distance [N] of each sample to its k-th nearest neighbour, itself not counted."""
    return torch.cat(
        [
            distance.topk(k + 1, dim=1, largest=False).values[:, k]
            for _, distance in _blocks(samples, samples)
        ]
    )


def _blocks(rows: Tensor, columns: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Euclidean distances, a block of rows at a time."""
    for start in range(0, len(rows), BLOCK):
        part = slice(start, start + BLOCK)
        yield part, torch.cdist(rows[part], columns)


def label_metrics(labels: Labels, classes: int) -> dict[str, float]:
    """How evenly a classifier's labels of the samples are spread over the classes.

    Args:
        labels: [N], in [0, classes).
        classes: How many there are.

    Returns:
        `label_entropy` in nats, at most log(classes); `label_balance`, how often the rarest class
        occurs for one occurrence of the commonest, 0 to 1.
    """
    counts = label_histogram(labels, classes)
    shares = counts[counts > 0] / counts.sum()
    return {
        "label_entropy": float(-(shares * np.log(shares)).sum()) + 0.0,  # no -0.0
        "label_balance": float(counts.min() / counts.max()),
    }


def label_histogram(labels: Labels, classes: int) -> NDArray[np.int64]:
    """How often each class occurs, [classes]."""
    return np.bincount(labels, minlength=classes)


STILL = ViewConfig(rotate=0, shift=0, scale=0, shear=0, warp=0, erase=0)
"""No views: what the images lack is not to be made up for."""


def train_and_score_classifier(
    images: Pixels,
    labels: Labels,
    test_images: Pixels,
    test_labels: Labels,
    classes: int,
    config: ClassifierConfig | None = None,
) -> float:
    """Accuracy on real images of a classifier trained on these (Ravuri and Vinyals, 2019, CAS).

    Args:
        images: uint8 [N, H, W, C], generated or, for the floor, real.
        labels: [N], of the conditions they were generated under, or a reference's.
        test_images: [M, H, W, C], real.
        test_labels: [M].
        classes: How many there are.
        config: How the classifier is built and trained; the default takes twenty seconds of
            one core for 10,000 digits.

    Returns:
        A share, 0 to 1.
    """
    config = config or ClassifierConfig(width=16, features=64, epochs=6, lr=0.05, views=STILL)
    network = train_classifier(images, labels, classes, config)
    return float((classifier_outputs(network, test_images).argmax(1) == test_labels).mean())


@dataclass(frozen=True)
class MetricValue:
    """A measure of generated images, and of as many real training images: its floor."""

    value: float
    floor: float


def classification_accuracy_score(
    samples: tuple[Pixels, Labels],
    train: tuple[Pixels, Labels],
    test: tuple[Pixels, Labels],
    classes: int,
    seed: int = 0,
) -> MetricValue:
    """`classification_accuracy` of generated images, and of as many real ones, drawn at random."""
    images, labels = train
    drawn = np.random.default_rng(seed).permutation(len(images))[: len(samples[0])]
    return MetricValue(
        train_and_score_classifier(*samples, *test, classes),
        train_and_score_classifier(images[drawn], labels[drawn], *test, classes),
    )


@dataclass(frozen=True)
class Fidelity:
    """What the samples are worth.

    Args:
        features: Which features the distances are over, such as `mnist-classifier`.
        count: Images in each set.
        metrics: By the names of `fidelity`, `label_figures` and `classification_accuracy`.
        histogram: How often each class occurs among the samples, by the reference; None where it
            gives no labels.
    """

    features: str
    count: int
    metrics: dict[str, MetricValue]
    histogram: list[int] | None


class FidelityEvaluator:
    """Measures generated images against real test images, and real training images likewise.

    The latter are the floors. They and the real features are computed once, so that a judge that is
    kept measures many times at half the price.

    Args:
        reference: Its features are compared.
        train: uint8 [N, H, W, C].
        test: [M, H, W, C].
        count: Images of each set, drawn at random; None is as many as the smaller of the two has.
        seed: Of what is drawn.

    Raises:
        UserError: There are fewer images than `count`, or they are of the wrong kind.
    """

    def __init__(
        self,
        reference: FeatureExtractor,
        train: Pixels,
        test: Pixels,
        count: int | None = None,
        seed: int = 0,
    ):
        fewest = min(len(train), len(test))
        self.reference, self.seed = reference, seed
        self.count = fewest if count is None else count
        if not NEIGHBOURS < self.count <= fewest:
            raise UserError(
                f"{self.count} images of each kind cannot be compared: there are {len(train)} "
                f"training and {len(test)} test images, and it takes more than {NEIGHBOURS}."
            )
        self.real = reference.features(self._draw(test))
        self.floors, _ = self._figures(self._draw(train))

    def measure(self, samples: Pixels) -> Fidelity:
        """Every figure but the classifier's accuracy, which takes longer: see `classification`.

        Args:
            samples: uint8 [at least count, H, W, C], generated; `count` are drawn at random.

        Raises:
            UserError: They are fewer, or not like the real ones.
        """
        if len(samples) < self.count:
            raise UserError(
                f"{len(samples)} generated images cannot be compared with {self.count} real ones: "
                f"generate {self.count}, or compare fewer."
            )
        values, histogram = self._figures(self._draw(samples))
        metrics = {name: MetricValue(value, self.floors[name]) for name, value in values.items()}
        return Fidelity(self.reference.name, self.count, metrics, histogram)

    def _figures(self, images: Pixels) -> tuple[dict[str, float], list[int] | None]:
        features = self.reference.features(images)
        metrics = compute_fidelity(self.real, features, seed=self.seed)
        if not isinstance(self.reference, ReferenceClassifier | StackedReference):
            return metrics, None
        classes = self.reference.classes
        labels = self.reference.labels(features)
        histogram = label_histogram(labels, classes).tolist()
        return metrics | label_metrics(labels, classes), histogram

    def _draw(self, images: Pixels) -> Pixels:
        return images[np.random.default_rng(self.seed).permutation(len(images))[: self.count]]


def _double(features: Floats) -> Tensor:
    return torch.from_numpy(np.asarray(features, np.float64))


def _check_features(real: Floats, fake: Floats, k: int) -> None:
    sets = {"real": real, "generated": fake}
    for kind, features in sets.items():
        if features.ndim != 2 or features.shape[1] != real.shape[-1]:
            raise UserError(
                f"The {kind} features are of shape {list(features.shape)}, the real ones "
                f"{list(real.shape)}: both must be [N, d] of the same d."
            )
        if len(features) <= k:
            raise UserError(f"{len(features)} {kind} images are too few: it takes more than {k}.")
        if not np.isfinite(features).all():
            row = int(np.flatnonzero(~np.isfinite(features).all(1))[0])
            raise UserError(
                f"The features of the {kind} image {row} are not finite: the network that made "
                "the image or the features has broken weights."
            )
