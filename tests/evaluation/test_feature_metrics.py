"""Clusters and checks without labels, against naive versions and known values."""

from collections.abc import Iterator
from itertools import permutations
from typing import Any

import numpy as np
import pytest
from helpers.datasets import mnist

from cl_ray.data.dataset import UNLABELLED
from cl_ray.errors import UserError
from cl_ray.evaluation import clustering
from cl_ray.evaluation.feature_metrics import (
    FeatureData,
    adjusted_rand_index,
    cluster_accuracy,
    effective_rank,
    feature_alignment,
    feature_uniformity,
    kmeans_accuracy,
    normalized_mutual_information,
    sample_view_pairs,
)


@pytest.fixture(autouse=True, scope="module")
def _few_steps() -> Iterator[None]:
    """These clusters take fewer steps than those of a trained D."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clustering, "_STEPS", 50)
        yield


def blobs(count: int, apart: float, seed: int = 0) -> Any:
    """Four Gaussians in 70 dimensions, the same ones for every seed, and their numbers."""
    random, labels = np.random.default_rng([seed]), np.arange(count) % 4
    means = np.random.default_rng(99).standard_normal((4, 70)) * apart
    return (means[labels] + random.standard_normal((count, 70))).astype(np.float32), labels


def measured(apart: float, **changes: Any) -> FeatureData:
    (x, y), (q, truth) = blobs(400, apart), blobs(200, apart, seed=1)
    given = {"labels": y, "test_labels": truth, "views": (q, q), **changes}
    return FeatureData(x, q, **given)


@pytest.fixture(scope="module")
def vague() -> FeatureData:
    """Classes that overlap."""
    return measured(apart=0.25)


def unlabelled(features: Any, views: Any = None) -> FeatureData:
    features = np.asarray(features, np.float32)
    return FeatureData(features, features, views or (features, features))


def test_clusters_that_are_the_classes_by_other_numbers() -> None:
    data = measured(apart=12)
    for metric in (
        cluster_accuracy,
        kmeans_accuracy,
        normalized_mutual_information,
        adjusted_rand_index,
    ):
        score = metric(data)
        assert (score.value, score.spread) == (1, 0)
    shuffled = measured(apart=12, test_labels=np.random.default_rng(0).permutation(200) % 4)
    assert abs(adjusted_rand_index(shuffled).value) < 0.05
    assert normalized_mutual_information(shuffled).value < 0.1
    assert 0.25 <= cluster_accuracy(shuffled).value < 0.4


def test_accuracy_is_that_of_the_best_assignment_over_five_seeds(vague: FeatureData) -> None:
    best = [
        max(
            float((np.array(order)[clusters] == vague.test_labels).mean())
            for order in permutations(range(4))
        )
        for clusters in vague.clusters
    ]
    score = cluster_accuracy(vague)
    assert len(best) == 5
    assert len(set(best)) > 1
    assert score.value == pytest.approx(np.mean(best))
    assert score.spread == pytest.approx(np.std(best, ddof=1))
    assert cluster_accuracy(measured(apart=0.25, seed=9)) != score


def test_labels_only_count_the_clusters(vague: FeatureData) -> None:
    """And nothing else decides: the same again."""
    changes = {"labels": np.arange(400) // 100, "test_labels": np.arange(200) % 2}
    other = measured(apart=0.25, **changes).clusters
    assert all(map(np.array_equal, vague.clusters, other))


def test_clusters_are_compared_with_the_labels_that_there_are() -> None:
    (_, labels), (q, truth) = blobs(400, 0.25), blobs(200, 0.25, seed=1)
    known = np.arange(200) % 3 > 0
    some = np.where(known, truth, UNLABELLED)
    found = measured(apart=0.25, labels=np.where(labels, labels, UNLABELLED), test_labels=some)
    x, _ = blobs(400, 0.25)
    alone = FeatureData(x, q[known], (q, q), labels[labels > 0], truth[known])
    for metric in (cluster_accuracy, normalized_mutual_information, adjusted_rand_index):
        assert metric(found) == metric(alone)


def test_alignment_and_uniformity_are_those_of_the_paper() -> None:
    random = np.random.default_rng(0)
    first, second = (random.standard_normal((90, 6)).astype(np.float32) for _ in range(2))
    x, y = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in (first, second))
    data = unlabelled(first, (first, second))
    assert feature_alignment(data).value == pytest.approx(((x - y) ** 2).sum(1).mean(), rel=1e-5)
    far = ((x[:, None] - x[None]) ** 2).sum(2)[~np.eye(90, dtype=bool)]
    expected = np.log(np.exp(-2 * far).mean())
    assert feature_uniformity(data).value == pytest.approx(expected, rel=1e-4)
    scaled = unlabelled(7 * first, (7 * first, second))
    assert feature_uniformity(scaled).value == pytest.approx(expected, rel=1e-4)
    assert feature_uniformity(unlabelled(np.ones((9, 4)))).value == pytest.approx(0, abs=1e-5)
    assert feature_uniformity(unlabelled(np.ones((1, 4)))).value == 0


@pytest.mark.parametrize("shape", [(300, 12), (12, 300)])
def test_the_effective_rank_is_the_entropy_of_the_singular_values(shape: tuple[int, int]) -> None:
    x = np.random.default_rng(0).standard_normal(shape) * 0.7 ** np.arange(shape[1])
    fractions = np.linalg.svd(x.astype(np.float32).astype(float), compute_uv=False)
    fractions /= fractions.sum()
    expected = np.exp(-(fractions * np.log(fractions)).sum())
    assert effective_rank(unlabelled(x)).value == pytest.approx(expected, rel=1e-3)


def test_two_different_views_of_each_image() -> None:
    images, _ = mnist("test", 30)
    first, second = sample_view_pairs(images)
    assert first.shape == second.shape == images.shape
    assert first.dtype == np.uint8
    far = np.abs(first.astype(int)[:, None] - second[None]).sum((2, 3, 4))
    assert far.diagonal().mean() < 0.9 * far.mean()  # of the same images, in their order
    assert (far.diagonal() > 0).all()
    assert np.array_equal(sample_view_pairs(images)[1], second)
    assert not np.array_equal(sample_view_pairs(images, seed=1)[1], second)


def test_features_that_are_no_numbers_are_refused() -> None:
    broken = np.ones((4, 3), np.float32)
    broken[2, 1] = np.nan
    with pytest.raises(UserError, match="test image 2 are NaN or Inf"):
        unlabelled(np.ones((4, 3)), (np.ones((4, 3), np.float32), broken))
