"""What is promised to be measured is what an evaluation then gives, of every kind of data."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.run_folder import leave, trained_run

import cl_ray
from cl_ray.cli import main
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.sources import SourceConfig, write_dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.evaluation.available_metrics import available_metrics
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator

FEW = {"samples": 40, "images": 60}


@pytest.fixture(scope="module")
def data(make_digits: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Digits, stacked ones, digits by other names, ones without labels, and 402 kinds of noise."""
    folder = tmp_path_factory.mktemp("data")
    rows = Dataset.open(make_digits(300)).read("train")
    assert rows.label is not None
    names = [f"{i} things" for i in range(10)]
    noise = np.random.default_rng(0).integers(0, 256, (402, 28, 28, 1), dtype=np.uint8)
    sets: dict[str, tuple[Any, list[Any], list[str] | None]] = {
        "renamed": (rows.image, rows.label.tolist(), names),
        "bare": (rows.image, [None] * 300, None),
        "many": (noise, [*range(402)], None),
    }
    for name, (images, labels, classes) in sets.items():
        pictures = [RawImage(x, k, "a test") for x, k in zip(images, labels, strict=True)]
        write_splits(
            {"train": pictures},
            str(folder / name),
            DatasetMetadata(name, "a test", classes=classes),
        )
    stacked = SourceConfig(
        source="stacked-mnist", out=f"{folder}/stacked", count=300, test_count=60
    )
    write_dataset(stacked)
    return {"digits": make_digits(300), **{n: f"{folder}/{n}" for n in (*sets, "stacked")}}


@pytest.mark.parametrize(
    ("name", "reference", "condition"),
    [
        ("digits", "mnist", "none"),
        ("digits", "mnist", "projection"),
        ("digits", "none", "projection"),
        ("renamed", "mnist", "projection"),
        ("stacked", "auto", "projection"),
        ("bare", "mnist", "none"),
        ("bare", "auto", "none"),
        ("many", "mnist", "none"),
    ],
)
def test_an_evaluation_gives_what_was_promised(
    data: Any, tmp_path: Path, name: str, reference: str, condition: str
) -> None:
    how = EvaluationConfig(reference=reference, **FEW)
    run = trained_run(data[name], condition=condition, evaluation=how)
    loaded = cl_ray.load(leave(run, tmp_path, step=10))
    dataset = Dataset.open(data[name])
    found = Evaluator(dataset, how).evaluate(loaded).metrics()
    assert sorted(available_metrics(run.config, dataset)) == sorted(found)


def test_what_a_search_goes_by_if_nobody_says(data: Any) -> None:
    firsts = {
        "stacked": "frechet",
        "digits": "linear_probe",
        "many": "knn_1",
        "bare": "reconstruction",
    }
    for name, first in firsts.items():
        assert available_metrics(Config(data=data[name]), Dataset.open(data[name]))[0] == first


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("many", ["linear_probe"], "linear_probe' is not among what is measured of this data of "
         "more than 200 classes: take evaluation/knn_1, evaluation/knn_20, evaluation/recon"),
        ("digits", ["class_accuracy"], "class_accuracy' is not among what is measured of networks "
         "that are told no classes (condition none): take evaluation/linear_probe,"),
        ("digits", ["class_accuracy", "--condition=projection"], "of this data without a "
         "reference (evaluation.reference): take"),
        ("renamed", ["class_accuracy", "--condition=classifier", "--evaluation.reference=mnist"],
         "by evaluation.reference 'mnist', which does not name its classes: take"),
        ("bare", ["knn_1"], "of this data without labels: take evaluation/reconstruction."),
        ("digits", ["modes"], "of this data, not being stacked-mnist: take"),
        ("digits", ["fid"], "of networks: take"),
        ("digits", ["knn_1", "--evaluation.every=0"], "evaluation.every 0 is none: raise it"),
    ],
)  # fmt: skip
def test_a_best_that_would_never_be_marked_is_refused_before_anything_starts(
    data: Any, tmp_path: Path, capsys: Any, name: str, flags: list[str], words: str
) -> None:
    storage = tmp_path / "runs"
    metric, *others = flags
    common = [f"--data={data[name]}", f"--storage={storage}"]
    with pytest.raises(SystemExit) as end:
        main(["train", *common, f"--checkpoint.metric=evaluation/{metric}", *others])
    assert end.value.code == 1
    printed = capsys.readouterr()
    assert words in printed.err
    assert printed.err.count("\n") == 1
    assert "Starting Ray" not in printed.out
    assert not storage.exists()
