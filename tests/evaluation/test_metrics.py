"""The registry: what is announced is what an evaluation then has, of every kind of data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from helpers.datasets import mnist, write_images
from helpers.refusal import refused
from helpers.run_folder import save_run, trained_run

import cl_ray
from cl_ray.data.dataset import Dataset
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset
from cl_ray.errors import UserError
from cl_ray.evaluation import evaluate
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.evaluation.fidelity import Samples
from cl_ray.evaluation.metrics import (
    METRICS,
    SAMPLE_METRICS,
    MetricContext,
    available_metrics,
    check_metric_available,
    is_larger_better,
    metric_title,
    sample_metric,
)

FEW = {"samples": 40, "images": 60}


@pytest.fixture(scope="module")
def data(make_digits: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Digits, stacked ones, digits by other names, ones without labels, and 402 kinds of noise."""
    folder = tmp_path_factory.mktemp("data")
    images, labels = mnist("train", 300)
    names = [f"{i} things" for i in range(10)]
    noise = np.random.default_rng(0).integers(0, 256, (402, 28, 28, 1), dtype=np.uint8)
    stacked = {"source": "stacked-mnist", "out": f"{folder}/stacked"}
    write_dataset(SourceConfig(**stacked, count=300, test_count=60))
    return {
        "digits": make_digits(300),
        "renamed": write_images(folder / "renamed", classes=names, train=(images, labels)),
        "bare": write_images(folder / "bare", train=(images, [None] * 300)),
        "many": write_images(folder / "many", train=(noise, range(402))),
        "stacked": stacked["out"],
    }


@pytest.mark.parametrize(
    ("name", "reference", "condition"),
    [
        ("digits", "mnist", "none"),
        ("digits", "mnist", "classifier"),
        ("digits", "none", "projection"),
        ("renamed", "mnist", "projection"),
        ("stacked", "auto", "projection"),
        ("bare", "mnist", "none"),
        ("many", "mnist", "none"),
    ],
)
def test_an_evaluation_has_the_available_metrics(
    data: Any, tmp_path: Path, name: str, reference: str, condition: str
) -> None:
    config = EvaluationConfig(reference=reference, **FEW)
    trainer = trained_run(data[name], condition=condition, evaluation=config)
    model = cl_ray.load(save_run(trainer, tmp_path, step=10))
    dataset = Dataset.open(data[name])
    found = Evaluator(dataset, config).evaluate(model)
    context = MetricContext.of(dataset, config, condition)
    assert sorted(available_metrics(context)) == sorted(found.metrics())
    skipped = "Not measured of this data of more than 200 classes: linear probe."
    assert (skipped in found.notes) == (name in ("many", "stacked"))


def test_the_first_metric_is_what_a_search_optimises_by_default(data: Any) -> None:
    firsts = ("stacked", "frechet"), ("digits", "linear_probe"), ("many", "knn_1")
    for name, first in (*firsts, ("bare", "reconstruction")):
        context = MetricContext.of(Dataset.open(data[name]), EvaluationConfig(), "none")
        assert available_metrics(context)[0] == first


def test_one_class_is_not_probed(tmp_path: Path) -> None:
    images, _ = mnist("train", 60)
    folder = write_images(tmp_path / "one", train=(images, [0] * 60), test=(images, [0] * 60))
    context = MetricContext.of(Dataset.open(folder), EvaluationConfig(), "none")
    assert not {"linear_probe", "knn_1", "cluster_accuracy"} & {*available_metrics(context)}
    with pytest.raises(UserError, match="this data of one class in the split train"):
        check_metric_available("linear_probe", context, "metric")


def test_directions_and_titles() -> None:
    smaller = {name for metric in METRICS for name in metric.names if not is_larger_better(name)}
    distances = {"frechet", "frechet_over_baseline", "kernel", "mode_kl", "reconstruction"}
    found = distances | {"alignment", "uniformity", "classifier_error"}
    assert smaller == found, "name a new metric here of which less is better"
    assert metric_title("knn_1") == "1-NN"
    assert metric_title("something_new") == "something new"


def test_a_new_metric_takes_one_function_and_one_entry(
    data: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It then is in the evaluation, beside its baseline."""

    def brightness(samples: Samples) -> float:
        return float(samples.images.mean() / 255)

    entry = sample_metric("brightness", "mean brightness", brightness, larger_is_better=True)
    monkeypatch.setattr(evaluate, "SAMPLE_METRICS", (*SAMPLE_METRICS, entry))
    config = EvaluationConfig(reference="mnist", **FEW)
    model = cl_ray.load(save_run(trained_run(data["digits"]), tmp_path, step=10))
    found = Evaluator(Dataset.open(data["digits"]), config).evaluate(model)
    assert found.fidelity is not None
    metric = found.fidelity.metrics["brightness"]
    assert metric.value == pytest.approx(model.generate(40).mean() / 255)
    assert 0.05 < metric.real_baseline < 0.2
    assert found.metrics()["brightness"] == metric.value


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("many", ["linear_probe"], "linear_probe' is not measured during training for this data of "
         "more than 200 classes: use evaluation/knn_1, evaluation/knn_20, evaluation/recon"),
        ("digits", ["class_accuracy"], "class_accuracy' is not measured during training for "
         "networks that are told no classes (condition none): use evaluation/linear_probe,"),
        ("digits", ["class_accuracy", "--condition=projection"], "for this data without a "
         "reference (evaluation.reference): use"),
        ("renamed", ["class_accuracy", "--condition=classifier", "--evaluation.reference=mnist"],
         "by evaluation.reference 'mnist', which does not name its classes: use"),
        ("digits", ["classifier_error", "--condition=projection"],
         "for networks without a classifier (condition projection): use"),
        ("bare", ["knn_1"], "for this data without labels: use evaluation/reconstruction."),
        ("digits", ["modes"], "for this data, not being stacked-mnist: use"),
        ("digits", ["fid"], "for networks: use"),
        ("digits", ["few_labels"], "for networks: use"),
        ("digits", ["knn_1", "--evaluation.every=0"], "evaluation.every 0"),
    ],
)  # fmt: skip
def test_a_checkpoint_metric_that_is_not_measured_is_refused_before_anything_starts(
    data: Any, tmp_path: Path, capsys: Any, name: str, flags: list[str], words: str
) -> None:
    storage = tmp_path / "runs"
    metric, *others = flags
    chosen = f"--checkpoint.metric=evaluation/{metric}", *others
    message = refused(capsys, "train", f"--data={data[name]}", f"--storage={storage}", *chosen)
    assert words in message
    assert not ray.is_initialized()
    assert not storage.exists()
