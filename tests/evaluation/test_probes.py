"""Probes against naive versions, scikit-learn and dense linear algebra."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from cl_ray.errors import UserError
from cl_ray.evaluation import probes as module
from cl_ray.evaluation.probes import (
    ALPHA,
    EDGES,
    FEW,
    SEEDS,
    conjugate_gradients,
    evaluate_representation,
    fit_few_labels,
    fit_linear_probe,
    label_spreading,
    linear_probe,
    majority_vote,
    nearest_neighbours,
    sample_few_labels,
)

Blobs = tuple[Tensor, Tensor]


def blobs(count: int, size: int, classes: int, apart: float, seed: int = 0) -> Blobs:
    """Gaussians around random centres, the same ones for every seed."""
    random = torch.Generator().manual_seed(seed)
    centres = torch.randn(classes, size, generator=torch.Generator().manual_seed(99)) * apart
    labels = torch.arange(count) % classes
    return centres[labels] + torch.randn(count, size, generator=random), labels


@pytest.mark.parametrize("block", [7, 500])
def test_nearest_is_the_sorted_distances(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    bank, _ = blobs(90, 5, 4, 1)
    queries, _ = blobs(40, 5, 4, 1, seed=1)
    a, b = bank.double().numpy(), queries.double().numpy()
    far = ((b[:, None] - a[None]) ** 2).sum(2)
    assert np.array_equal(nearest_neighbours(bank, queries, 9).numpy(), far.argsort(1)[:, :9])


def test_the_majority_and_its_ties() -> None:
    rows = torch.tensor([[2, 1, 1, 0], [2, 2, 1, 1], [3, 0, 3, 0], [0, 1, 2, 3]])
    assert majority_vote(rows, 4).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("k", [1, 5, 20])
def test_neighbours_are_those_of_scikit_learn(k: int) -> None:
    bank, labels = blobs(300, 8, 5, 0.5)
    queries, _ = blobs(200, 8, 5, 0.5, seed=1)
    theirs = KNeighborsClassifier(k).fit(bank.numpy(), labels.numpy()).predict(queries.numpy())
    assert np.array_equal(
        majority_vote(labels[nearest_neighbours(bank, queries, k)], 5).numpy(), theirs
    )


@pytest.mark.parametrize("penalty", [1e-1, 1e-2, 1e-3])
def test_a_fit_is_that_of_scikit_learn(penalty: float) -> None:
    x, y = blobs(400, 6, 3, 0.5)
    ours = fit_linear_probe(x, y, 3, penalty)
    theirs = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=2000)
    theirs.fit(x.double().numpy(), y.numpy())
    assert np.allclose(ours.weight.numpy(), theirs.coef_, atol=2e-3)
    bias = ours.bias.numpy()
    assert np.allclose(bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=2e-3)
    other = torch.full((3, 6), 5.0), torch.full((3,), -2.0)
    again = fit_linear_probe(x, y, 3, penalty, module.Probe(*other, penalty=1))
    assert torch.allclose(again.weight, ours.weight, atol=2e-3)  # wherever it starts
    assert torch.equal(other[0], torch.full((3, 6), 5.0))


def test_a_fit_minimises_its_loss() -> None:
    """In float64 the gradient of the stated loss vanishes at the solution."""
    x, y = blobs(200, 4, 3, 0.7)
    probe = fit_linear_probe(x.double(), y, 3, 1e-2)
    weight, bias = probe.weight.requires_grad_(), probe.bias.requires_grad_()
    probabilities = (x.double() @ weight.T + bias).log_softmax(1)
    loss = -probabilities[torch.arange(200), y].mean() + 1e-2 / 2 * (weight**2).sum()
    for gradient in torch.autograd.grad(loss, [weight, bias]):
        assert gradient.abs().max() < 1e-4


@pytest.mark.parametrize(("count", "size"), [(20, 50), (50, 50), (60, 8)])
def test_few_images_are_fitted_in_their_span(count: int, size: int) -> None:
    x, y = blobs(count, size, 4, 1)
    small, whole = fit_few_labels(x, y, 4, 1e-2), fit_linear_probe(x, y, 4, 1e-2)
    assert torch.allclose(small.weight, whole.weight, atol=2e-3)
    q, _ = blobs(200, size, 4, 1, seed=1)
    assert torch.allclose(small(q), whole(q), atol=2e-2)


def test_the_penalty_is_chosen_by_what_was_held_out() -> None:
    """One feature that says little among many that say nothing needs a strong one; a small
    difference of two features that says all needs large weights."""
    x, _ = blobs(600, 400, 2, 0)
    doubt = torch.randn(600, generator=torch.Generator().manual_seed(5))
    strong = linear_probe(x, (x[:, 0] + 2 * doubt > 0).long(), 2).penalty
    alike = torch.stack([x[:, 0], x[:, 0] + x[:, 1] / 20], 1)
    weak = linear_probe(alike, (x[:, 1] > 0).long(), 2).penalty
    assert strong == 1e-1
    assert weak < 1e-2


def test_of_equal_penalties_the_strongest_is_taken() -> None:
    x, y = blobs(600, 4, 3, 50)
    assert linear_probe(x, y, 3).penalty == module.PENALTIES[0]


def test_the_chosen_penalty_is_fitted_to_all() -> None:
    x, y = blobs(300, 5, 3, 0.6)
    probe = linear_probe(x, y, 3, seed=4)
    assert torch.allclose(probe.weight, fit_linear_probe(x, y, 3, probe.penalty).weight, atol=2e-3)


def test_few_labels_are_ten_of_each_class() -> None:
    labels = np.random.default_rng(0).integers(0, 4, 200)
    drawn = [sample_few_labels(labels, 4, seed, draw) for seed in (0, 1) for draw in (0, 1)]
    for rows in drawn:
        assert len(set(rows.tolist())) == 40
        assert np.bincount(labels[rows]).tolist() == [FEW] * 4
    assert len({tuple(rows) for rows in drawn}) == 4
    assert np.array_equal(drawn[0], sample_few_labels(labels, 4, 0, 0))
    with pytest.raises(UserError, match="Class 4 has 0 images: 10"):
        sample_few_labels(labels, 5, 0, 0)


def test_conjugate_gradients_solve() -> None:
    random = np.random.default_rng(0)
    root = random.standard_normal((30, 30)).astype(np.float32)
    matrix = root @ root.T + 5 * np.eye(30, dtype=np.float32)
    right = random.standard_normal((30, 4)).astype(np.float32)
    right[:, 2] = 0
    found = conjugate_gradients(lambda x: matrix @ x, right, tolerance=1e-6)
    assert np.allclose(found, np.linalg.solve(matrix.astype(np.float64), right), atol=1e-4)


def naive_spread(x: Any, y: Any, q: Any, classes: int, chosen: NDArray[np.int64]) -> list[int]:
    """Zhou et al. by a dense inverse in float64."""
    x, q = x.double().numpy(), q.double().numpy()
    far = ((x[:, None] - x[None]) ** 2).sum(2)
    np.fill_diagonal(far, np.inf)
    graph = np.zeros((len(x), len(x)))
    for row in range(len(x)):
        for column in far[row].argsort()[:EDGES]:
            graph[row, column] += 1
            graph[column, row] += 1
    degree = graph.sum(1)
    known = np.zeros((len(x), classes))
    known[chosen, y.numpy()[chosen]] = 1
    beliefs = np.linalg.inv(np.eye(len(x)) - ALPHA * graph / np.sqrt(np.outer(degree, degree)))
    beliefs = beliefs @ known
    sums = beliefs.sum(1, keepdims=True)
    beliefs = np.divide(beliefs, sums, out=np.zeros_like(beliefs), where=sums > 1e-9)
    around = ((q[:, None] - x[None]) ** 2).sum(2).argsort(1)[:, :EDGES]
    return beliefs[around].sum(1).argmax(1).tolist()


def test_spreading_is_the_dense_inverse() -> None:
    x, y = blobs(240, 6, 4, 0.8)
    q, _ = blobs(150, 6, 4, 0.8, seed=1)
    draws = [sample_few_labels(y.numpy(), 4, 0, draw) for draw in range(3)]
    found = label_spreading(x, y, q, 4, draws)
    wanted = [naive_spread(x, y, q, 4, chosen) for chosen in draws]
    assert wanted[0] != wanted[1]
    alike = (found == torch.tensor(wanted)).double().mean()
    assert alike > 0.99  # but for draws between two classes


def test_spreading_looks_at_no_other_label() -> None:
    x, y = blobs(240, 6, 4, 0.8)
    q, _ = blobs(50, 6, 4, 0.8, seed=1)
    draws = [sample_few_labels(y.numpy(), 4, 0, draw) for draw in range(2)]
    hidden = torch.full_like(y, 3)
    named = np.unique(np.concatenate(draws))
    hidden[named] = y[named]
    assert torch.equal(label_spreading(x, y, q, 4, draws), label_spreading(x, hidden, q, 4, draws))


def test_spreading_follows_the_shape_of_the_data(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two half moons: labels at one end of each are carried along it, also on a part of them."""
    angle = torch.linspace(0, np.pi, 60)
    one = torch.stack([angle.cos(), angle.sin()], 1)
    other = torch.stack([1 - angle.cos(), 0.4 - angle.sin()], 1)
    x, y = torch.cat([one, other]), torch.arange(120) // 60
    ends = np.concatenate([np.arange(10), np.arange(60, 70)])
    assert (label_spreading(x, y, x, 2, [ends])[0] == y).double().mean() > 0.99
    straight = fit_linear_probe(x[ends], y[ends], 2, 1e-2)(x).argmax(1)
    assert (straight == y).double().mean() < 0.9
    monkeypatch.setattr(module, "GRAPH", 80)
    assert (label_spreading(x, y, x, 2, [ends])[0] == y).double().mean() > 0.99


def test_spreading_over_principal_components(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that matters lies in the leading ones."""
    x, y = blobs(300, 12, 4, 4)
    x[:, 6:] *= 1e-3
    q, truth = blobs(100, 12, 4, 4, seed=1)
    monkeypatch.setattr(module, "DIMENSIONS", 6)
    draws = [sample_few_labels(y.numpy(), 4, 0, 0)]
    assert (label_spreading(x, y, q, 4, draws)[0] == truth).double().mean() > 0.98


@pytest.fixture(scope="module")
def easy() -> Any:
    x, y = blobs(600, 8, 4, 0.9)
    q, truth = blobs(400, 8, 4, 0.9, seed=1)
    return x.numpy(), y.numpy(), q.numpy(), truth.numpy()


def test_all_scores(easy: Any) -> None:
    x, y, q, truth = easy
    found = evaluate_representation(*easy)
    assert set(found.scores) == {
        *("knn_1", "knn_20", "linear_probe", "labels_40", "labels_40_spread")
    }
    assert found.notes == []
    for score in found.scores.values():
        assert 0.7 < score.accuracy < 1
        assert score.error == 1 - score.accuracy
        assert score.seconds > 0
    for k in (1, 20):
        theirs = KNeighborsClassifier(k).fit(x, y).score(q, truth)
        assert found.scores[f"knn_{k}"].accuracy == pytest.approx(theirs)
    assert found.scores["linear_probe"].accuracy > found.scores["knn_1"].accuracy
    few = found.scores["labels_40"]
    assert few.spread is not None
    assert 0 < few.spread < 0.1
    common = np.sqrt(x.var(0, ddof=1).mean())
    x_even, q_even = (torch.from_numpy((part - x.mean(0)) / common).float() for part in (x, q))
    ours, theirs = [], []
    for draw in range(SEEDS):
        rows = sample_few_labels(y, 4, 0, draw)
        given = x_even[rows], y[rows]
        probe = fit_linear_probe(given[0], torch.from_numpy(given[1]), 4, 1e-2)
        ours.append((probe(q_even).argmax(1).numpy() == truth).mean())
        regression = LogisticRegression(C=1 / (1e-2 * len(rows)), max_iter=1000)
        theirs.append(regression.fit(*given).score(q_even, truth))
    assert few.accuracy == pytest.approx(np.mean(ours), abs=3e-4)  # an image of one draw
    assert few.accuracy == pytest.approx(np.mean(theirs), abs=2e-3)
    assert few.spread == pytest.approx(np.std(ours, ddof=1), rel=0.01)


def test_test_labels_are_only_compared_with(easy: Any) -> None:
    """With other test labels, every choice and every prediction is what it was."""
    x, y, q, truth = easy
    given, turned = (
        evaluate_representation(x, y, q, truth),
        evaluate_representation(x, y, q, (truth + 1) % 4),
    )
    for name, score in given.scores.items():
        assert score.setting == turned.scores[name].setting
        assert score.accuracy + turned.scores[name].accuracy <= 1


def test_a_seed_gives_the_same_scores(easy: Any) -> None:
    def without_time(seed: int) -> Any:
        scores = evaluate_representation(*easy, seed=seed).scores
        return {k: (s.accuracy, s.spread, s.setting) for k, s in scores.items()}

    assert without_time(1) == without_time(1)
    assert without_time(1)["labels_40"] != without_time(2)["labels_40"]


def test_a_rare_class_costs_only_the_few_labels(easy: Any) -> None:
    x, y, q, truth = easy
    kept = (y != 2) | (np.cumsum(y == 2) <= 9)
    found = evaluate_representation(x[kept], y[kept], q, truth)
    assert set(found.scores) == {"knn_1", "knn_20", "linear_probe"}
    assert found.notes == ["labels_40 needs 10 labels of every class: class 2 has 9."]


def test_many_classes_are_read_by_neighbours_only() -> None:
    """A probe of a thousand classes would take many minutes, and spreading labels many GB."""
    x, y = (part.numpy() for part in blobs(3 * 1000, 8, 1000, 3))
    q, truth = (part.numpy() for part in blobs(1000, 8, 1000, 3, seed=1))
    found = evaluate_representation(x, y, q, truth)
    assert set(found.scores) == {"knn_1", "knn_20"}
    for k in (1, 20):
        theirs = KNeighborsClassifier(k).fit(x, y).score(q, truth)
        assert found.scores[f"knn_{k}"].accuracy == pytest.approx(theirs)
    (note,) = found.notes
    assert note.startswith("1000 classes or more are too many for the linear probe and the scores")
    assert "few labels" not in evaluate_representation(x, y, q, truth, few=False).notes[0]


def test_dead_and_tiny_features(easy: Any) -> None:
    x, y, q, truth = easy
    dead = [np.concatenate([part, np.full_like(part, 7)], 1) for part in (x, q)]
    plain, found = (
        evaluate_representation(*easy),
        evaluate_representation(dead[0], y, dead[1], truth),
    )
    for name, score in plain.scores.items():
        assert found.scores[name].accuracy == pytest.approx(score.accuracy, abs=0.01)
    same = evaluate_representation(np.ones_like(x), y, np.ones_like(q), truth)
    assert same.scores["linear_probe"].accuracy <= 0.6
    few = evaluate_representation(x[:6], y[:6], q, truth)
    assert set(few.scores) == {"knn_1", "knn_20", "linear_probe"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a: a.__setitem__(2, a[2][:, :5]), r"test features.*\[400, 5\].*\[600, 8\]"),
        (lambda a: a.__setitem__(0, a[0][:, 0]), r"training features.*\[600\]"),
        (lambda a: a.__setitem__(1, a[1][:-1]), r"training labels, int64 \[599\]"),
        (lambda a: a.__setitem__(3, a[3] * 0.5), r"test labels, float64"),
        (lambda a: a.__setitem__(1, a[1] - 1), "from 0"),
        (lambda a: a.__setitem__(2, a[2][:0]), r"test features.*\[0, 8\]"),
        (lambda a: a[2].__setitem__((5, 3), np.inf), "features of test image 5 are not finite"),
    ],
)
def test_what_cannot_be_probed_is_named(easy: Any, change: Any, words: str) -> None:
    arrays = [part.copy() for part in easy]
    change(arrays)
    with pytest.raises(UserError, match=words):
        evaluate_representation(*arrays)
