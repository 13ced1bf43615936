"""Fidelity against naive versions, the `prdc` package, and cases with known answers."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.datasets import mnist
from helpers.ranks import run_on_ranks
from numpy.typing import NDArray
from prdc import compute_prdc

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
from cl_ray.evaluation.reference import ReferenceClassifier

Floats = NDArray[np.float32]
EVEN = np.full(1000, 1e-3)


def normal(count: int, size: int = 6, seed: int = 0, shift: float = 0, scale: float = 1) -> Floats:
    random = np.random.default_rng([seed, count, size])
    mixed = random.standard_normal((count, size)) @ random.standard_normal((size, size))
    return (scale * mixed + shift).astype(np.float32)


def distances_and_manifolds(real: Floats, fake: Floats) -> dict[str, float]:
    distances = {"frechet": frechet_distance(real, fake), "kernel": kernel_distance(real, fake)}
    return distances | manifold_metrics(real, fake)


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


def test_frechet_of_known_gaussians() -> None:
    """Of two Gaussians in one dimension it is (m - m')^2 + (s - s')^2."""
    unit = np.array([[-1], [1], [-1], [1]], np.float32) * math.sqrt(3 / 4)  # mean 0, variance 1
    assert frechet_distance(unit, 3 * unit + 5) == pytest.approx(25 + 4, rel=1e-5)


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


def on_rank_zero() -> dict[str, float] | None:
    """Compute metrics on rank 0, while rank 1 does something else."""
    import torch.distributed as dist

    sets = normal(40, 3, 0), normal(40, 3, 1)
    return distances_and_manifolds(*sets) if dist.get_rank() == 0 else None


def test_a_rank_measures_without_the_others() -> None:
    first, second = run_on_ranks(on_rank_zero, 2)
    assert second is None
    assert first == pytest.approx(distances_and_manifolds(normal(40, 3, 0), normal(40, 3, 1)))


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize(
    ("reals", "fakes", "k", "shift"),
    [(60, 60, 5, 0.0), (50, 31, 3, 0.8), (14, 90, 1, 0.8), (60, 60, 5, 3.0)],
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


def test_known_sets() -> None:
    """A set and itself, sets far apart, and fakes that are all of one of two kinds."""
    real = normal(200)
    same = distances_and_manifolds(real, real)
    assert same["frechet"] == pytest.approx(0, abs=1e-6)
    assert same["precision"] == same["recall"] == same["coverage"] == 1
    assert same["density"] > 1  # each ball holds its centre and k more
    far = distances_and_manifolds(real, normal(200, seed=1, shift=1000))
    assert far["precision"] == far["recall"] == far["density"] == far["coverage"] == 0
    assert far["frechet"] == pytest.approx(6 * 1000**2, rel=0.1)
    assert far["kernel"] > 1e6
    both = np.concatenate([real, normal(200, seed=1, shift=1000)])
    half = manifold_metrics(both, real + normal(200, seed=3, scale=1e-3))
    assert half["precision"] == 1
    assert half["recall"] == half["coverage"] == 0.5


def test_the_order_of_the_samples_does_not_matter() -> None:
    real, fake = normal(200), normal(150, seed=1, shift=0.5)
    found = distances_and_manifolds(real, fake)
    reversed_ = distances_and_manifolds(real[::-1].copy(), fake[::-1].copy())
    for name in set(found) - {"kernel"}:  # whose subsets are of other rows
        assert found[name] == pytest.approx(reversed_[name], rel=1e-9)


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
    assert label_balance(counts) == pytest.approx(balance)


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
    unknown = rows % 3 == 0  # counted nowhere, neither in training nor in the accuracy
    some_labels = np.where(unknown, UNLABELLED, labels)
    some = Samples(images, some_labels, rows, normal(9), test, reference, 0)
    alone = Samples(images[~unknown], labels[~unknown], rows[:400], normal(9), test, reference, 0)
    expected = classification_accuracy_score(alone, config)
    assert classification_accuracy_score(some, config) == expected
    assert test.label is not None
    half = RowBatch(rows, test.image, np.where(unknown, UNLABELLED, test.label))
    real = Samples(test.image, half.label, rows, normal(9), half, reference, 0)
    right = reference.labels(reference.features(test.image)) == test.label
    assert module.class_accuracy(real) == right[~unknown].mean()
    assert accuracy((labels + 1) % 10) < 0.1


def test_mode_kl_is_the_naive_sum() -> None:
    random = np.random.default_rng(0)
    expected = random.dirichlet(np.full(40, 2.0))
    labels = random.choice(40, 500, p=random.dirichlet(np.full(40, 0.3)))
    divergence = 0.0
    for mode in range(40):
        fraction = sum(label == mode for label in labels.tolist()) / 500
        divergence += fraction * math.log(fraction / expected[mode]) if fraction else 0
    histogram = np.bincount(labels, minlength=40)
    assert mode_kl(histogram, expected) == pytest.approx(divergence, rel=1e-12)


def test_mode_kl_of_known_samples() -> None:
    def kl(labels: NDArray[np.int64]) -> float:
        return mode_kl(np.bincount(labels, minlength=1000), EVEN)

    assert kl(np.full(26_000, 123)) == pytest.approx(math.log(1000))
    assert kl(np.arange(26_000) % 500) == pytest.approx(math.log(2))
    assert kl(np.arange(26_000) % 1000) == 0
    draws = [kl(np.random.default_rng(seed).integers(0, 1000, 26_000)) for seed in range(20)]
    assert np.mean(draws) == pytest.approx(999 / 52_000, rel=0.05)


def test_impossible_fractions_of_the_modes_are_refused() -> None:
    for expected in (EVEN[:-1], np.r_[EVEN[1:], 0.0]):
        with pytest.raises(UserError, match="must be positive and add up to 1"):
            mode_kl(np.ones(len(expected), np.int64), expected)


def test_expected_modes_are_products_of_digit_frequencies() -> None:
    fractions = expected_mode_fractions()
    label = load_digits("train").label
    assert label is not None
    assert fractions.sum() == pytest.approx(1)
    product = (label == 4).mean() * (label == 0).mean() * (label == 7).mean()
    assert fractions[407] == pytest.approx(product)
