"""Fidelity against naive versions, the `prdc` package, and cases with known answers."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.datasets import mnist
from numpy.typing import NDArray
from prdc import compute_prdc
from torchmetrics.image.fid import FrechetInceptionDistance

from cl_ray.data.dataset import UNLABELLED, RowBatch
from cl_ray.data.stacked_mnist import load_digits
from cl_ray.errors import UserError
from cl_ray.evaluation import fidelity as module
from cl_ray.evaluation.classifier import ClassifierConfig
from cl_ray.evaluation.fidelity import (
    Samples,
    classification_accuracy_score,
    expected_mode_fractions,
    frechet_distance,
    kernel_distance,
    label_balance,
    label_entropy,
    manifold_metrics,
    mode_kl,
)
from cl_ray.evaluation.metrics import SAMPLE_METRICS
from cl_ray.evaluation.reference import ReferenceClassifier

Floats = NDArray[np.float32]
EVEN = np.full(1000, 1e-3)


def normal(count: int, size: int = 6, seed: int = 0, shift: float = 0, scale: float = 1) -> Floats:
    random = np.random.default_rng([seed, count, size])
    mixed = random.standard_normal((count, size)) @ random.standard_normal((size, size))
    return (scale * mixed + shift).astype(np.float32)


def naive_frechet(real: Floats, fake: Floats) -> float:
    (m, s), (n, t) = (
        (part.astype(np.float64).mean(0), np.atleast_2d(np.cov(part.T.astype(np.float64))))
        for part in (real, fake)
    )
    root = scipy.linalg.sqrtm(s @ t)
    return float(((m - n) ** 2).sum() + np.trace(s + t - 2 * root.real))


def naive_kernel(real: Floats, fake: Floats) -> float:
    def k(x: Any, y: Any) -> float:
        return (float(x @ y) / len(x) + 1) ** 3

    xs, ys = real.astype(np.float64), fake.astype(np.float64)
    n = len(xs)
    within = sum(k(z[i], z[j]) for z in (xs, ys) for i in range(n) for j in range(n) if i != j)
    across = sum(k(x, y) for x in xs for y in ys)
    return within / (n * (n - 1)) - 2 * across / n**2


@pytest.mark.parametrize(("size", "shift", "scale"), [(1, 0, 1), (4, 0.3, 1), (9, 2, 0.5)])
def test_frechet_is_the_formula(size: int, shift: float, scale: float) -> None:
    real, fake = normal(300, size), normal(200, size, 1, shift, scale)
    assert frechet_distance(real, fake) == pytest.approx(naive_frechet(real, fake), rel=1e-9)


@pytest.mark.parametrize(("size", "shift"), [(1, 0.0), (5, 0.4), (5, 3.0)])
def test_kernel_is_the_double_loop(size: int, shift: float) -> None:
    real, fake = normal(40, size), normal(40, size, 1, shift)
    state = torch.random.get_rng_state()
    assert kernel_distance(real, fake) == pytest.approx(naive_kernel(real, fake), rel=1e-9)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_kernel_is_the_mean_over_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SUBSET_SIZE", 60)
    real, fake = normal(400), normal(300, seed=1, shift=0.5)
    whole = naive_kernel(real[:300], fake)
    assert kernel_distance(real, fake, seed=1) == pytest.approx(whole, rel=0.2)
    assert kernel_distance(real, fake, seed=1) == kernel_distance(real, fake, seed=1)
    assert kernel_distance(real, fake, seed=1) != kernel_distance(real, fake, seed=2)


def test_a_rank_measures_without_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """As rank 0 of several, torchmetrics would by default gather from them, who do not come."""
    sets = normal(40, 3, 0), normal(40, 3, 1)
    expected = frechet_distance(*sets), kernel_distance(*sets)
    monkeypatch.setattr("torchmetrics.metric.jit_distributed_available", lambda: True)
    metric = FrechetInceptionDistance(module._Identity(3))
    for features, real in zip(sets, (True, False), strict=True):
        metric.update(torch.from_numpy(features).double(), real=real)
    with pytest.raises(ValueError, match="process group has not been initialized"):
        metric.compute()
    assert (frechet_distance(*sets), kernel_distance(*sets)) == expected


@pytest.mark.parametrize(
    ("reals", "fakes", "k", "shift", "block"),
    [(60, 60, 5, 0.0, 1000), (50, 31, 3, 0.8, 7), (14, 90, 1, 0.8, 7), (60, 60, 5, 3.0, 7)],
)
def test_manifolds_are_those_of_prdc(
    reals: int, fakes: int, k: int, shift: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_BLOCK_ROWS", block)
    real, fake = normal(reals), normal(fakes, seed=1, shift=shift)
    found = manifold_metrics(real, fake, k)
    theirs = compute_prdc(real.astype(np.float64), fake.astype(np.float64), k)
    assert found == pytest.approx(theirs, abs=1e-12)


def test_manifolds_of_many_dimensions_far_from_the_origin() -> None:
    """Distances that are small beside the features are where squares cancel."""
    real, fake = normal(300, 128, shift=1000), normal(300, 128, 1, shift=1000)
    near = real.astype(np.float64) - 1000, fake.astype(np.float64) - 1000
    assert manifold_metrics(real, fake) == pytest.approx(
        compute_prdc(*near, nearest_k=5), abs=1e-12
    )


@pytest.mark.parametrize(
    ("histogram", "entropy", "balance"),
    [
        ([1, 1, 1, 1], math.log(4), 1),
        ([0, 0, 7], 0, 0),
        ([3, 1], -0.75 * math.log(0.75) - 0.25 * math.log(0.25), 1 / 3),
        ([2, 2, 0], math.log(2), 0),
    ],
)
def test_label_metrics(histogram: list[int], entropy: float, balance: float) -> None:
    counts = np.array(histogram)
    assert label_entropy(counts) == pytest.approx(entropy)
    assert label_balance(counts, np.arange(len(counts))) == pytest.approx(balance)


def test_a_class_without_images_leaves_the_labels_balanced() -> None:
    images, labels = mnist("test", 300)
    rows, reference = np.arange(300), ReferenceClassifier.load("mnist")
    reference.classes = 11  # as of EMNIST's letters, whose first class is "N/A"
    features, test = reference.features(images), RowBatch(rows, images, labels)
    samples = Samples(images, None, rows, features, test, reference, seed=0)
    counts = samples.histogram
    assert counts[10] == 0
    balance = next(metric for metric in SAMPLE_METRICS if metric.name == "label_balance")
    assert balance.compute(samples) == pytest.approx(counts[:10].min() / counts.max())


def test_damaged_features_are_refused() -> None:
    real, fake = normal(20), np.where(np.arange(20)[:, None] == 7, np.nan, normal(20))
    reference: Any = SimpleNamespace(features=lambda images: fake[images])
    test = RowBatch(np.arange(20), *mnist("test", 20))
    with pytest.raises(UserError, match="of the generated image 7 are NaN"):
        _ = Samples(
            np.arange(20, dtype=np.uint8), None, np.arange(20), real, test, reference, seed=0
        ).features


def test_a_classifier_learns_from_correct_labels_only() -> None:
    (images, labels), rows = mnist("train", 600), np.arange(600)
    test, reference = RowBatch(rows, *mnist("test", 600)), ReferenceClassifier.load("mnist")
    config = ClassifierConfig(width=4, features=16, epochs=4, batch_size=32, views=module._NO_VIEWS)

    def accuracy(labels: NDArray[np.int64]) -> float:
        samples = Samples(images, labels, rows, normal(9), test, reference, seed=0)
        return classification_accuracy_score(samples, config)

    assert accuracy(labels) > 0.7
    unknown = rows % 3 == 0  # has the label that the reference predicts
    some = np.where(unknown, UNLABELLED, labels)
    predicted = reference.labels(reference.features(images))
    assert accuracy(some) == accuracy(np.where(unknown, predicted, labels))
    assert test.label is not None
    half = RowBatch(rows, test.image, np.where(unknown, UNLABELLED, test.label))
    real = Samples(test.image, half.label, rows, normal(9), half, reference, 0)
    right = reference.labels(reference.features(test.image)) == test.label
    assert module.class_accuracy(real) == right[~unknown].mean()
    assert accuracy((labels + 1) % 10) < 0.1


def test_mode_kl_is_the_naive_sum() -> None:
    random = np.random.default_rng(0)
    expected = random.dirichlet(np.full(40, 2.0))
    histogram = random.multinomial(500, random.dirichlet(np.full(40, 0.3)))
    terms = zip((histogram / 500).tolist(), expected.tolist(), strict=True)
    divergence = sum(p * math.log(p / q) for p, q in terms if p)
    assert mode_kl(histogram, expected) == pytest.approx(divergence, rel=1e-12)
    assert mode_kl(np.full(1000, 26), EVEN) == 0
    draws = random.multinomial(26_000, EVEN, 20)
    divergences = [mode_kl(draw, EVEN) for draw in draws]
    assert np.mean(divergences) == pytest.approx(999 / 52_000, rel=0.05)


def test_expected_modes_are_products_of_digit_frequencies() -> None:
    fractions = expected_mode_fractions()
    label = load_digits("train").label
    assert label is not None
    assert fractions.sum() == pytest.approx(1)
    product = (label == 4).mean() * (label == 0).mean() * (label == 7).mean()
    assert fractions[407] == pytest.approx(product)
