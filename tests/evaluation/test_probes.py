"""Probes against naive versions, scikit-learn and dense linear algebra."""

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from cl_ray.errors import UserError
from cl_ray.evaluation import probes
from cl_ray.evaluation.probes import ProbeData

ALL_PROBES = {
    "knn_1": lambda data: probes.knn_accuracy(data, 1),
    "knn_20": lambda data: probes.knn_accuracy(data, 20),
    "linear_probe": probes.linear_probe_accuracy,
    "few_labels": probes.few_labels_accuracy,
    "few_labels_spread": probes.few_labels_spread_accuracy,
}


def blobs(count: int, size: int, classes: int, apart: float, seed: int = 0) -> Any:
    """Gaussians around random centres, the same ones for every seed."""
    random, centres = np.random.default_rng([seed]), np.random.default_rng(99)
    labels = np.arange(count) % classes
    means = centres.standard_normal((classes, size)) * apart
    return (means[labels] + random.standard_normal((count, size))).astype(np.float32), labels


def test_knn_is_that_of_scikit_learn() -> None:
    """The smaller label wins a tie."""
    (x, y), (q, truth) = blobs(300, 8, 5, 0.5), blobs(200, 8, 5, 0.5, seed=1)
    data = ProbeData(x, y, q, truth)
    for k in (1, 20):
        theirs = KNeighborsClassifier(k).fit(data.components[0], y)
        expected = theirs.score(data.components[1], truth)
        assert probes.knn_accuracy(data, k).value == pytest.approx(expected)


@pytest.mark.parametrize("penalty", [1e-1, 1e-3])
def test_logistic_regression_minimises_the_stated_loss(penalty: float) -> None:
    """Its gradient vanishes at the solution, wherever the fit starts."""
    x, y = blobs(200, 4, 3, 0.7)
    model = probes.logistic_regression(x.astype(np.float64), y, penalty)
    logits = x @ model.coef_.T + model.intercept_
    error = np.exp(logits - np.log(np.exp(logits).sum(1, keepdims=True))) - np.eye(3)[y]
    assert abs(error.T @ x / len(x) + penalty * model.coef_).max() < 2e-3
    assert abs(error.mean(0)).max() < 2e-3
    far = probes.logistic_regression(x.astype(np.float64), y, 1e-5)
    again = probes.logistic_regression(x.astype(np.float64), y, penalty, far)
    assert np.allclose(again.predict_proba(x), model.predict_proba(x), atol=0.01)


def test_the_penalty_is_selected_on_held_out_images() -> None:
    """One feature that says little among many that say nothing needs a strong one; a small
    difference of two features that says all needs large weights.
    """
    x, _ = blobs(600, 400, 2, 0)
    doubt = np.random.default_rng(5).standard_normal(600)
    _, strong = probes.linear_probe(x, (x[:, 0] + 2 * doubt > 0).astype(int), x)
    features = np.stack([x[:, 0], x[:, 0] + x[:, 1] / 20], 1)
    predicted, weak = probes.linear_probe(features, (x[:, 1] > 0).astype(int), features)
    assert strong == 1e-1
    assert weak < 1e-2
    assert (predicted == (x[:, 1] > 0)).mean() > 0.9
    x, y = blobs(600, 4, 3, 50)
    assert probes.linear_probe(x, y, x)[1] == 1e-1  # of equals the strongest


def test_the_selected_penalty_is_fitted_to_all_images() -> None:
    """Also where a class is missing among those that it is selected by."""
    (x, y), (q, _) = blobs(300, 5, 3, 0.6), blobs(300, 5, 3, 0.6, seed=1)
    predicted, penalty = probes.linear_probe(x, y, q, seed=4)
    theirs = LogisticRegression(C=1 / (penalty * len(x)), max_iter=1000).fit(x, y).predict(q)
    assert (predicted == theirs).mean() > 0.99
    few, rare = np.concatenate([x[y < 2], x[y == 2][:1]]), np.r_[y[y < 2], 2]
    for seed in range(12):
        assert set(probes.linear_probe(few, rare, q, seed)[0]) <= {0, 1, 2}


def test_few_labels_are_ten_of_each_class() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    drawn = [probes.sample_few_labels(labels, seed, draw) for seed in (0, 1) for draw in (0, 1)]
    for rows in drawn:
        assert len(set(rows.tolist())) == 40
        assert np.bincount(labels[rows]).tolist() == [10] * 4
    assert len({tuple(rows) for rows in drawn}) == 4
    assert np.array_equal(drawn[0], probes.sample_few_labels(labels, 0, 0))
    with pytest.raises(UserError, match="class 4 has 9"):
        probes.sample_few_labels(np.r_[labels, [4] * 9], 0, 0)


def test_a_class_without_images_changes_no_probe() -> None:
    (x, y), (q, truth) = blobs(200, 8, 4, 0.6), blobs(200, 8, 4, 0.6, seed=1)
    plain, shifted = ProbeData(x, y, q, truth), ProbeData(x, y + 1, q, truth + 1)
    for name, probe in ALL_PROBES.items():
        assert probe(shifted) == probe(plain), name


@pytest.mark.parametrize("size", [8, 60])
def test_few_labels_are_fitted_alone_and_on_one_scale(size: int) -> None:
    """With fewer features than images and with more, as without the projection to their span."""
    (x, y), (q, truth) = blobs(600, size, 4, 0.6), blobs(400, size, 4, 0.6, seed=1)
    found = probes.few_labels_accuracy(ProbeData(x, y, q, truth))
    scale = np.sqrt(x.var(0, ddof=1).mean())
    theirs = []
    for draw in range(10):
        rows = probes.sample_few_labels(y, 0, draw)
        model = LogisticRegression(C=1 / (1e-2 * len(rows)), max_iter=1000)
        model.fit((x[rows] - x.mean(0)) / scale, y[rows])
        theirs.append(model.score((q - x.mean(0)) / scale, truth))
    assert found.value == pytest.approx(np.mean(theirs), abs=2e-3)
    assert found.spread == pytest.approx(np.std(theirs, ddof=1), rel=0.1)


def naive_spread(x: Any, y: Any, q: Any, classes: int, chosen: NDArray[np.int64]) -> list[int]:
    """Zhou et al. by a dense inverse in float64."""
    x, q = x.astype(np.float64), q.astype(np.float64)
    far = ((x[:, None] - x[None]) ** 2).sum(2)
    np.fill_diagonal(far, np.inf)
    graph = np.zeros((len(x), len(x)))
    for row in range(len(x)):
        for column in far[row].argsort()[: probes._EDGES]:
            graph[row, column] += 1
            graph[column, row] += 1
    degree = graph.sum(1)
    known = np.zeros((len(x), classes))
    known[chosen, y[chosen]] = 1
    system = np.eye(len(x)) - probes._ALPHA * graph / np.sqrt(np.outer(degree, degree))
    beliefs = np.linalg.inv(system) @ known
    sums = beliefs.sum(1, keepdims=True)
    beliefs = np.divide(beliefs, sums, out=np.zeros_like(beliefs), where=sums > 1e-9)
    around = ((q[:, None] - x[None]) ** 2).sum(2).argsort(1)[:, : probes._EDGES]
    return beliefs[around].sum(1).argmax(1).tolist()


def test_spreading_is_the_dense_inverse_and_reads_no_other_label() -> None:
    (x, y), (q, _) = blobs(240, 6, 4, 0.8), blobs(150, 6, 4, 0.8, seed=1)
    draws = [probes.sample_few_labels(y, 0, draw) for draw in range(3)]
    found = probes.label_spreading(x, y, q, 4, draws)
    naive = [naive_spread(x, y, q, 4, chosen) for chosen in draws]
    assert naive[0] != naive[1]
    assert (found == np.array(naive)).mean() > 0.99  # but for ties between two classes
    hidden = np.full_like(y, 3)
    labelled = np.unique(np.concatenate(draws))
    hidden[labelled] = y[labelled]
    assert np.array_equal(found, probes.label_spreading(x, hidden, q, 4, draws))


def test_spreading_follows_the_shape_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two half moons: labels at one end of each are carried along it, also on a part of them."""
    angle = np.linspace(0, np.pi, 60)
    one = np.stack([np.cos(angle), np.sin(angle)], 1)
    other = np.stack([1 - np.cos(angle), 0.4 - np.sin(angle)], 1)
    x, y = np.concatenate([one, other]).astype(np.float32), np.arange(120) // 60
    ends = np.concatenate([np.arange(10), np.arange(60, 70)])
    assert (probes.label_spreading(x, y, x, 2, [ends])[0] == y).mean() > 0.99
    straight = probes.logistic_regression(x[ends], y[ends], 1e-2).predict(x)
    assert (straight == y).mean() < 0.9
    monkeypatch.setattr(probes, "_GRAPH", 80)
    assert (probes.label_spreading(x, y, x, 2, [ends])[0] == y).mean() > 0.99


def test_principal_components_are_the_leading_eigenvectors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the training features alone, partly whitened, of unit length."""
    random = np.random.default_rng(0)
    scale = 0.8 ** np.arange(40)
    x, q = ((random.standard_normal((n, 40)) * scale + 3).astype(np.float32) for n in (300, 100))
    monkeypatch.setattr(probes, "_DIMENSIONS", 6)
    train, test = probes.principal_components(x, q)
    variances, axes = (part[..., -6:] for part in np.linalg.eigh(np.cov(x.T, ddof=0)))
    for found, original in ((train, x), (test, q)):
        exact = (original - x.mean(0)) @ axes / variances ** (0.75 / 2)
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        assert found.shape == exact.shape
        assert np.allclose(found @ found.T, exact @ exact.T, atol=1e-3)
    assert np.array_equal(probes.principal_components(x, q)[1], test)
    assert probes.principal_components(x[:5], q)[0].shape == (5, 5)


@pytest.fixture(scope="module")
def easy() -> Any:
    return *blobs(600, 8, 4, 0.9), *blobs(400, 8, 4, 0.9, seed=1)


def test_test_labels_are_only_compared_with_and_the_seed_decides(easy: Any) -> None:
    """With other test labels, every choice and every prediction is what it was."""
    x, y, q, truth = easy
    given, turned = ProbeData(x, y, q, truth), ProbeData(x, y, q, (truth + 1) % 4)
    for name, probe in ALL_PROBES.items():
        first, second = probe(given), probe(turned)
        assert 0.65 < first.value < 1, name
        assert first.setting == second.setting
        assert first.value + second.value <= 1
        assert probe(ProbeData(*easy)) == first
    assert probes.few_labels_accuracy(
        ProbeData(x, y, q, truth, seed=2)
    ) != probes.few_labels_accuracy(given)


def test_constant_and_few_features(easy: Any) -> None:
    x, y, q, truth = easy
    constant = [np.concatenate([part, np.full_like(part, 7)], 1) for part in (x, q)]
    data = ProbeData(constant[0], y, constant[1], truth)
    for name, probe in ALL_PROBES.items():
        plain = probe(ProbeData(*easy)).value
        assert probe(data).value == pytest.approx(plain, abs=0.01), name
    same = ProbeData(np.ones_like(x), y, np.ones_like(q), truth)
    assert probes.linear_probe_accuracy(same).value <= 0.6
    tiny = ProbeData(x[:6], y[:6], q, truth)
    assert 0 < probes.linear_probe_accuracy(tiny).value <= 1
    assert 0 < probes.knn_accuracy(tiny, 20).value <= 1
    one = ProbeData(x, np.ones_like(y), q, truth)
    for probe in (probes.linear_probe_accuracy, probes.few_labels_accuracy):
        with pytest.raises(UserError, match="two classes or more"):
            probe(one)


def test_damaged_features_are_refused(easy: Any) -> None:
    x, y, q, truth = easy
    damaged = np.where(np.arange(len(q))[:, None] == 5, np.inf, q)
    with pytest.raises(UserError, match="features of test image 5 are NaN or Inf"):
        ProbeData(x, y, damaged, truth)
