"""Modes of stacked digits: the measure, its floor, what reads them, and where people see it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.run_folder import save_run, trained_run

from cl_ray.data.dataset import Dataset
from cl_ray.data.sources import SourceConfig, write_dataset
from cl_ray.data.stacked_mnist import load_digits, mode_labels, sample_triples
from cl_ray.errors import UserError
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator, is_larger_better, resolve_reference, summary_line
from cl_ray.evaluation.modes import SAMPLES, ModeEvaluator, expected_mode_shares, mode_metrics
from cl_ray.evaluation.reference import StackedReference, load_features
from cl_ray.model import load

EVEN = np.full(1000, 1e-3)


@pytest.fixture(scope="module")
def judge() -> ModeEvaluator:
    return ModeEvaluator(StackedReference())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    out = str(tmp_path_factory.mktemp("stacked") / "triples")
    source = {"source": "stacked-mnist", "out": out, "seed": 3}
    write_dataset(SourceConfig(**source, count=160, test_count=60))
    return out


@pytest.fixture(scope="module")
def folder(data: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    return save_run(trained_run(data), tmp_path_factory.mktemp("runs"), step=5)


def stack(split: str, count: int, seed: int) -> tuple[Any, Any]:
    """Real triples and their modes."""
    rows, chosen = load_digits(split), sample_triples(split, count, seed)
    assert rows.label is not None
    return np.moveaxis(rows.image[chosen][..., 0], 1, 3), mode_labels(rows.label[chosen])


def test_the_figures_are_those_of_a_naive_count() -> None:
    random = np.random.default_rng(0)
    expected = random.dirichlet(np.full(40, 2.0))
    labels = random.choice(40, 500, p=random.dirichlet(np.full(40, 0.3)))
    divergence, found = 0.0, 0
    for mode in range(40):
        share = sum(label == mode for label in labels.tolist()) / 500
        if share:
            found += 1
            divergence += share * math.log(share / expected[mode])
    metrics = mode_metrics(labels, expected)
    assert metrics["modes"] == found < 40
    assert metrics["mode_kl"] == pytest.approx(divergence, rel=1e-12)
    assert is_larger_better("modes")
    assert not is_larger_better("mode_kl")


def test_known_cases() -> None:
    one = mode_metrics(np.full(26_000, 123), EVEN)
    assert one["modes"] == 1
    assert one["mode_kl"] == pytest.approx(math.log(1000))
    half = mode_metrics(np.arange(26_000) % 500, EVEN)
    assert half["modes"] == 500
    assert half["mode_kl"] == pytest.approx(math.log(2))
    assert mode_metrics(np.arange(26_000) % 1000, EVEN) == {"modes": 1000, "mode_kl": 0}
    drawn = [
        mode_metrics(np.random.default_rng(seed).integers(0, 1000, 26_000), EVEN)["mode_kl"]
        for seed in range(20)
    ]
    assert np.mean(drawn) == pytest.approx(999 / 52_000, rel=0.05)


def test_what_cannot_be_counted_is_refused() -> None:
    none = np.empty(0, np.int64)
    for labels, words in ((none, "not of none"), (np.array([3, 1000]), "not of 3 to 1000")):
        with pytest.raises(UserError, match=words):
            mode_metrics(labels, EVEN)
    for expected in (EVEN[:-1], np.r_[EVEN[1:], 0.0]):
        with pytest.raises(UserError, match="must be positive and add up to 1"):
            mode_metrics(np.array([3]), expected)


def test_the_data_s_shares_are_those_of_its_labels() -> None:
    shares = expected_mode_shares()
    label = load_digits("train").label
    assert label is not None
    assert shares.sum() == pytest.approx(1)
    wanted = (label == 4).mean() * (label == 0).mean() * (label == 7).mean()
    assert shares[407] == pytest.approx(wanted)
    _, labels = stack("train", 400_000, seed=0)
    counted = np.bincount(labels, minlength=1000)
    assert abs(counted - 400_000 * shares).max() < 6 * math.sqrt(400_000 * shares.max())


def test_the_classifier_tells_real_triples(judge: ModeEvaluator) -> None:
    images, labels = stack("test", 3000, seed=8)
    found = judge.labels(images)
    assert (found == labels).mean() > 0.98
    swapped = judge.labels(np.ascontiguousarray(images[:100, ..., ::-1]))
    backwards = labels[:100] // 100 + labels[:100] // 10 % 10 * 10 + labels[:100] % 10 * 100
    assert (swapped == backwards).mean() > 0.95
    with pytest.raises(UserError, match=r"takes uint8 images \[N, 28, 28, 3\]"):
        judge.labels(images[..., :1])


def test_real_triples_reach_the_floor_and_one_image_does_not(judge: ModeEvaluator) -> None:
    images, _ = stack("test", SAMPLES // 2, seed=9)
    real = judge.measure(images)
    assert real.count == SAMPLES // 2
    for figure in (real.metrics["modes"].value, real.metrics["modes"].floor):
        assert 995 <= figure <= 1000
    divergence = real.metrics["mode_kl"]
    assert divergence.value == pytest.approx(divergence.floor, rel=0.15)
    assert divergence.floor == pytest.approx(999 / SAMPLES, rel=0.2)
    one = judge.measure(np.repeat(images[:1], 50, axis=0))
    assert one.metrics["modes"].value == 1
    assert one.metrics["mode_kl"].value > 6


def test_stacked_data_is_known_by_its_record(data: str, make_digits: Any) -> None:
    dataset = Dataset.open(data)
    assert resolve_reference(dataset, "auto") == "stacked-mnist"
    assert resolve_reference(dataset, "none") is None
    assert isinstance(load_features("stacked-mnist"), StackedReference)
    grey = Dataset.open(make_digits(90))
    with pytest.raises(UserError, match=r"'stacked-mnist' takes images of \[28, 28, 3\], digits"):
        Evaluator(grey, EvaluationConfig(reference="stacked-mnist"))


def test_modes_are_counted_while_training(folder: Path, data: str, judge: ModeEvaluator) -> None:
    run, config = load(folder), EvaluationConfig(samples=400, images=160)
    before = torch.get_rng_state()
    found = Evaluator(Dataset.open(data), config).evaluate(run)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.modes
    assert (found.modes.count, found.modes.of) == (400, 1000)
    own = mode_metrics(judge.labels(run.generate(400, seed=0)), judge.expected)
    assert {name: found.metrics()[name] for name in own} == own
    assert f"{own['modes']:.0f} of 1000 modes in 400 samples" in summary_line(found)
    assert found.representation["discriminator"].scores.keys() == {"knn_1", "knn_20"}
    assert found.fidelity
    assert found.fidelity.count == 60  # as many as there are test images
