"""Modes of stacked digits: what reads them, the baseline, and evaluations while training."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.run_folder import save_run, trained_run

from cl_ray.data.dataset import Dataset
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset
from cl_ray.data.stacked_mnist import load_digits, mode_labels, sample_triples
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator, ModeEvaluator, summary_line
from cl_ray.evaluation.fidelity import expected_mode_fractions, mode_kl
from cl_ray.evaluation.reference import StackedReference
from cl_ray.model import load

COUNT = 8000
"""Real triples: enough that hardly a mode is missing by chance."""


@pytest.fixture(scope="module")
def evaluator() -> ModeEvaluator:
    return ModeEvaluator(StackedReference())


def read(evaluator: ModeEvaluator, images: Any) -> Any:
    """Return the modes that the reference sees in images."""
    return evaluator.reference.labels(evaluator.reference.features(images))


def test_real_triples_reach_the_baseline_and_one_image_does_not(evaluator: ModeEvaluator) -> None:
    rows, chosen = load_digits("test"), sample_triples("test", COUNT, seed=9)
    assert rows.label is not None
    images, labels = np.moveaxis(rows.image[chosen][..., 0], 1, 3), mode_labels(rows.label[chosen])
    assert (read(evaluator, images[:1000]) == labels[:1000]).mean() > 0.98
    real = evaluator.measure(images)
    assert (real.count, real.of) == (COUNT, 1000)
    modes, divergence = real.metrics["modes"], real.metrics["mode_kl"]
    assert min(modes.value, modes.real_baseline) >= 995
    assert divergence.value == pytest.approx(divergence.real_baseline, rel=0.15)
    assert divergence.real_baseline == pytest.approx(999 / 2 / COUNT, rel=0.2)
    counts = np.bincount(labels, minlength=1000)  # and the expected fractions are those of triples
    assert abs(counts - len(labels) * expected_mode_fractions()).max() < 7 * math.sqrt(
        counts.mean()
    )
    one = evaluator.measure(np.repeat(images[:1], 50, axis=0)).metrics
    assert one["modes"].value == 1
    assert one["mode_kl"].value > 6


def test_modes_are_counted_while_training(evaluator: ModeEvaluator, tmp_path: Path) -> None:
    data = str(tmp_path / "triples")
    source = {"source": "stacked-mnist", "out": data, "seed": 3}
    write_dataset(SourceConfig(**source, count=160, test_count=60))
    model = load(save_run(trained_run(data), tmp_path, step=5))
    config = EvaluationConfig(samples=400, images=160)
    before = torch.get_rng_state()
    found = Evaluator(Dataset.open(data), config).evaluate(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.modes
    assert found.modes.count == 400
    histogram = np.bincount(read(evaluator, model.generate(400, seed=0)), minlength=1000)
    assert found.metrics()["modes"] == (histogram > 0).sum()
    assert found.metrics()["mode_kl"] == mode_kl(histogram, expected_mode_fractions())
    assert f"{(histogram > 0).sum()} of 1000 modes in 400 samples" in summary_line(found)
    assert found.representation["discriminator"].keys() == {"knn_1", "knn_20"}
    assert found.fidelity
    assert found.fidelity.count == 60  # as many as there are validation images
