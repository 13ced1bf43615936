"""The cluster head: its loss against a naive version, and clusters that k-means does not find."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from cl_ray.evaluation.classifier import Floats, Labels
from cl_ray.evaluation.clustering import balance, disagreement, fit_cluster_heads


def strips(count: int, seed: int = 0) -> tuple[Floats, Labels]:
    """Points of two long strips side by side, and their strip."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    points = np.stack([random.uniform(-2.5, 2.5, count), 2 * labels + random.normal(0, 0.1, count)])
    return points.T.astype(np.float32), labels


def agreement(found: Labels, labels: Labels) -> float:
    same = float((found == labels).mean())
    return max(same, 1 - same)


def test_it_finds_strips_that_kmeans_cuts_across() -> None:
    (x, _), (q, truth) = strips(400), strips(200, seed=1)
    [head] = fit_cluster_heads(x, 2, [0])
    assert agreement(head.predict(q), truth) > 0.99
    assert agreement(KMeans(2, n_init=10, random_state=0).fit(x).predict(q), truth) < 0.7


def test_the_loss_is_that_of_a_naive_version() -> None:
    x, _ = strips(60)
    [head] = fit_cluster_heads(x, 3, [5])
    seen = (x - x.mean(0)) / head.scale
    assert seen.std() == pytest.approx(1, abs=0.02)
    far = ((seen[:, None] - seen[None]) ** 2).sum(2)
    neighbours = far.argsort(1)[:, 1:11]
    logits = seen @ head.weight.numpy() + head.bias.numpy()
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    pairs = [(i, j) for i in range(60) for j in neighbours[i]]
    apart = np.mean([-math.log(max(float(p[i] @ p[j]), 1e-8)) for i, j in pairs])
    mean = p.mean(0)
    entropy = -float((mean * np.log(np.maximum(mean, 1e-30))).sum())
    assert head.loss == pytest.approx(apart - 2 * entropy, abs=1e-4)


def test_terms_of_the_loss() -> None:
    sure = torch.eye(2)[:, None]  # two rows, one head, two clusters
    assert disagreement(sure, sure).item() == 0
    assert disagreement(sure, sure.flip(0)).item() == pytest.approx(-math.log(1e-8))
    assert balance(sure).item() == pytest.approx(math.log(2))
    assert balance(sure[:1], sure[:1]).item() == 0


def test_a_seed_gives_the_same_head() -> None:
    x, _ = strips(100)
    first, other = fit_cluster_heads(x, 2, [1, 2])
    with torch.no_grad():  # as where D computes the features
        (second,) = fit_cluster_heads(x, 2, [1])
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)


def test_equal_features_are_one_cluster() -> None:
    [head] = fit_cluster_heads(np.ones((20, 4), np.float32), 3, [0])
    found = head.predict(np.ones((5, 4), np.float32))
    assert len(set(found.tolist())) == 1
