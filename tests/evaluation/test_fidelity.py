"""Fidelity against naive versions in float64, the `prdc` package, and cases with known answers."""

import math
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import torch
from helpers.ranks import together
from numpy.typing import NDArray
from prdc import compute_prdc

from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.evaluation import fidelity as module
from cl_ray.evaluation.classifier import ClassifierConfig
from cl_ray.evaluation.fidelity import (
    STILL,
    FidelityEvaluator,
    MetricValue,
    classification_accuracy_score,
    compute_fidelity,
    frechet_distance,
    kernel_distance,
    label_histogram,
    label_metrics,
    manifold_metrics,
    train_and_score_classifier,
)
from cl_ray.evaluation.reference import ReferenceClassifier

Floats = NDArray[np.float32]


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


def naive_manifolds(real: Floats, fake: Floats, k: int) -> dict[str, float]:
    xs, ys = [list(map(float, x)) for x in real], [list(map(float, y)) for y in fake]

    def radius(i: int, rows: list[list[float]]) -> float:
        return sorted(math.dist(rows[i], other) for j, other in enumerate(rows) if j != i)[k - 1]

    of_real = [radius(i, xs) for i in range(len(xs))]
    of_fake = [radius(j, ys) for j in range(len(ys))]
    far = [[math.dist(x, y) for y in ys] for x in xs]
    rows, columns = range(len(xs)), range(len(ys))
    return {
        "precision": sum(any(far[i][j] <= of_real[i] for i in rows) for j in columns) / len(ys),
        "recall": sum(any(far[i][j] <= of_fake[j] for j in columns) for i in rows) / len(xs),
        "density": sum(far[i][j] <= of_real[i] for i in rows for j in columns) / k / len(ys),
        "coverage": sum(any(far[i][j] <= of_real[i] for j in columns) for i in rows) / len(xs),
    }


@pytest.mark.parametrize(("size", "shift", "scale"), [(1, 0, 1), (4, 0.3, 1), (9, 2, 0.5)])
def test_frechet_is_the_formula(size: int, shift: float, scale: float) -> None:
    real, fake = normal(300, size), normal(200, size, 1, shift, scale)
    assert frechet_distance(real, fake) == pytest.approx(naive_frechet(real, fake), rel=1e-9)


def test_frechet_of_known_gaussians() -> None:
    """Of two Gaussians in one dimension it is (m - m')^2 + (s - s')^2."""
    unit = np.float32([[-1], [1], [-1], [1]]) * math.sqrt(3 / 4)  # mean 0, variance 1
    assert frechet_distance(unit, 3 * unit + 5) == pytest.approx(25 + 4, rel=1e-5)


@pytest.mark.parametrize(("size", "shift"), [(1, 0.0), (5, 0.4), (5, 3.0)])
def test_kernel_is_the_double_loop(size: int, shift: float) -> None:
    real, fake = normal(40, size), normal(40, size, 1, shift)
    assert kernel_distance(real, fake) == pytest.approx(naive_kernel(real, fake), rel=1e-9)


def test_kernel_is_the_mean_over_subsets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUBSET", 60)
    real, fake = normal(400), normal(300, seed=1, shift=0.5)
    pairs = min(len(real), len(fake))
    whole = naive_kernel(real[:pairs], fake[:pairs])
    assert kernel_distance(real, fake, seed=1) == pytest.approx(whole, rel=0.2)
    assert kernel_distance(real, fake, seed=1) == kernel_distance(real, fake, seed=1)
    assert kernel_distance(real, fake, seed=1) != kernel_distance(real, fake, seed=2)


def alone() -> dict[str, float] | None:
    """Metrics on rank 0, while rank 1 has something else to do."""
    import torch.distributed as dist

    sets = normal(40, 3, 0), normal(40, 3, 1)
    return compute_fidelity(*sets) if dist.get_rank() == 0 else None


def test_a_rank_measures_without_the_others() -> None:
    there, nothing = together(alone, 2)
    assert nothing is None
    assert there == pytest.approx(compute_fidelity(normal(40, 3, 0), normal(40, 3, 1)))


def test_nobody_elses_random_numbers_are_drawn() -> None:
    state = torch.random.get_rng_state()
    kernel_distance(normal(30), normal(30, seed=1))
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("block", [7, 1000])
@pytest.mark.parametrize(("reals", "fakes", "k"), [(60, 60, 5), (50, 31, 3), (14, 90, 1)])
@pytest.mark.parametrize("shift", [0.0, 0.8, 3.0])
def test_manifolds_are_the_loops_and_prdc(
    reals: int, fakes: int, k: int, shift: float, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "BLOCK", block)
    real, fake = normal(reals), normal(fakes, seed=1, shift=shift)
    found = manifold_metrics(real, fake, k)
    assert found == pytest.approx(naive_manifolds(real, fake, k), abs=1e-12)
    theirs = compute_prdc(real.astype(np.float64), fake.astype(np.float64), k)
    assert found == pytest.approx(theirs, abs=1e-12)


def test_manifolds_of_many_dimensions_far_from_the_origin() -> None:
    """Distances that are small beside the features are where squares cancel."""
    real, fake = normal(300, 128, shift=1000), normal(300, 128, 1, shift=1000)
    theirs = compute_prdc(
        real.astype(np.float64) - 1000, fake.astype(np.float64) - 1000, nearest_k=5
    )
    assert manifold_metrics(real, fake) == pytest.approx(theirs, abs=1e-12)


def test_a_set_and_itself() -> None:
    real = normal(200)
    found = compute_fidelity(real, real)
    assert found["frechet"] == pytest.approx(0, abs=1e-6)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    assert found["density"] > 1  # each ball holds its middle and k more


def test_the_order_of_the_samples_is_nothing() -> None:
    real, fake = normal(200), normal(150, seed=1, shift=0.5)
    found = compute_fidelity(real, fake)
    turned = compute_fidelity(real[::-1].copy(), fake[::-1].copy())
    assert found.keys() == turned.keys()
    for name in set(found) - {"kernel"}:  # of which subsets are drawn
        assert found[name] == pytest.approx(turned[name], rel=1e-9)


def test_sets_far_apart() -> None:
    found = compute_fidelity(normal(200), normal(200, seed=1, shift=1000))
    assert found["precision"] == found["recall"] == found["density"] == found["coverage"] == 0
    assert found["frechet"] == pytest.approx(6 * 1000**2, rel=0.1)
    assert found["kernel"] > 1e6


def test_half_of_the_modes() -> None:
    """Fakes that are good but all of one kind: precise, and blind to the other kind."""
    one, other = normal(200), normal(200, seed=1, shift=1000)
    fake = normal(400, seed=2)[:200] * 0 + one + normal(200, seed=3, scale=1e-3)
    found = compute_fidelity(np.concatenate([one, other]), fake)
    assert found["precision"] == 1
    assert found["recall"] == found["coverage"] == 0.5


@pytest.mark.parametrize(
    ("labels", "classes", "entropy", "balance"),
    [
        ([0, 1, 2, 3], 4, math.log(4), 1),
        ([2] * 7, 3, 0, 0),
        ([0, 0, 0, 1], 2, -0.75 * math.log(0.75) - 0.25 * math.log(0.25), 1 / 3),
        ([0, 0, 1, 1], 3, math.log(2), 0),
    ],
)
def test_label_figures(labels: list[int], classes: int, entropy: float, balance: float) -> None:
    found = label_metrics(np.array(labels), classes)
    assert found == pytest.approx({"label_entropy": entropy, "label_balance": balance})
    assert label_histogram(np.array(labels), classes).tolist() == [
        labels.count(c) for c in range(classes)
    ]


@pytest.mark.parametrize(
    ("real", "fake", "words"),
    [
        (normal(20, 4), normal(20, 5), r"\[20, 5\].*\[20, 4\]"),
        (normal(20)[:, 0], normal(20), r"real features are of shape \[20\]"),
        (normal(20), normal(5), "5 generated images are too few"),
        (normal(3), normal(20), "3 real images are too few"),
        (normal(20), np.where(np.arange(20)[:, None] == 7, np.nan, normal(20)), "image 7 are not"),
    ],
)
def test_what_cannot_be_compared_is_named(real: Floats, fake: Floats, words: str) -> None:
    with pytest.raises(UserError, match=words):
        compute_fidelity(real, fake)


@pytest.fixture(scope="module")
def digits() -> dict[str, tuple[Any, Any]]:
    data = Dataset.open("mnist")
    found = {}
    for split in ("train", "test"):
        rows = data.read(split, data.row_groups(split)[:1])
        assert rows.label is not None
        found[split] = rows.image[:600], rows.label[:600]
    return found


@pytest.fixture(scope="module")
def judge(digits: dict[str, tuple[Any, Any]]) -> FidelityEvaluator:
    return FidelityEvaluator(
        ReferenceClassifier.load("mnist"), digits["train"][0], digits["test"][0], count=500
    )


def test_a_judge_puts_each_figure_beside_its_floor(
    judge: FidelityEvaluator, digits: dict[str, tuple[Any, Any]]
) -> None:
    train = digits["train"][0]
    real = judge.measure(train)
    assert (real.features, real.count) == ("mnist-classifier", 500)
    assert set(real.metrics) == {
        *("frechet", "kernel", "precision", "recall", "density", "coverage"),
        *("label_entropy", "label_balance"),
    }
    for figure in real.metrics.values():  # training images are their own floor
        assert figure.value == figure.floor
    blurred = judge.measure((train // 2 + np.roll(train, 1, 0) // 2).astype(np.uint8))
    worse = {name: figure.value - figure.floor for name, figure in blurred.metrics.items()}
    assert worse["frechet"] > 0 < worse["kernel"]
    assert max(worse[name] for name in ("precision", "recall", "density", "coverage")) < 0
    assert blurred.metrics["frechet"].floor == real.metrics["frechet"].floor


def test_a_judge_sees_a_missing_class(
    judge: FidelityEvaluator, digits: dict[str, tuple[Any, Any]]
) -> None:
    images, labels = digits["train"]
    chosen = np.resize(images[labels != 4], images.shape)
    found = judge.measure(chosen)
    assert found.histogram is not None
    assert sum(found.histogram) == 500
    assert found.histogram[4] < 5
    assert found.metrics["label_balance"].value < 0.1 < found.metrics["label_balance"].floor
    assert found.metrics["label_entropy"].value < found.metrics["label_entropy"].floor


def test_a_judge_refuses_too_few(
    judge: FidelityEvaluator, digits: dict[str, tuple[Any, Any]]
) -> None:
    train, test = digits["train"][0], digits["test"][0]
    with pytest.raises(UserError, match="499 generated images cannot be compared with 500"):
        judge.measure(train[:499])
    for count in (0, -1, 5, 601):
        with pytest.raises(UserError, match=f"^{count} images of each kind.*600 training and 600"):
            FidelityEvaluator(judge.reference, train, test, count)


def test_a_classifier_learns_from_right_labels_only(digits: dict[str, tuple[Any, Any]]) -> None:
    images, labels = digits["train"]
    config = ClassifierConfig(width=4, features=16, epochs=4, batch_size=32, views=STILL)
    wrong = (labels + 1) % 10
    right = train_and_score_classifier(images, labels, *digits["test"], 10, config)
    astray = train_and_score_classifier(images, wrong, *digits["test"], 10, config)
    assert right > 0.7
    assert astray < 0.1


def test_classification_has_a_floor_of_as_many_images(
    digits: dict[str, tuple[Any, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    def count(images: Any, labels: Any, *rest: Any) -> float:
        given.append((images, labels))
        return float(len(given))

    monkeypatch.setattr(module, "classification_accuracy", count)
    images, labels = digits["train"]
    samples = images[:50], np.full(50, 3)
    figure = classification_accuracy_score(samples, digits["train"], digits["test"], 10)
    assert figure == MetricValue(1.0, 2.0)
    assert given[0] == samples
    label_of = {image.tobytes(): label for image, label in zip(images, labels, strict=True)}
    drawn = [image.tobytes() for image in given[1][0]]
    assert len(set(drawn)) == 50
    assert [label_of[image] for image in drawn] == given[1][1].tolist()
    assert drawn != [image.tobytes() for image in images[:50]]
