"""The evaluators: each metric is the function of the registry, on the right images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import mnist, write_images
from helpers.random_images import colour_noise
from helpers.refusal import refused
from helpers.run_folder import save_run, trained_run

from cl_ray.cli import main
from cl_ray.data.dataset import UNLABELLED, Dataset, RowBatch
from cl_ray.evaluation import evaluate
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import (
    Evaluator,
    FidelityEvaluator,
    MetricValue,
    evaluate_representation,
    pixel_features,
    summary_line,
)
from cl_ray.evaluation.fidelity import Samples, frechet_distance
from cl_ray.evaluation.metrics import (
    FEATURE_METRICS,
    PROBE_METRICS,
    SAMPLE_METRICS,
    Metric,
    MetricContext,
)
from cl_ray.evaluation.probes import ProbeData, nearest_neighbours, principal_components
from cl_ray.evaluation.reference import ReferenceClassifier
from cl_ray.model import load

TRAIN, TEST = 300, 120
CONFIG = EvaluationConfig(reference="mnist", samples=TEST, images=TRAIN)
DIGITS = MetricContext(Dataset.open("mnist"), "mnist", condition="none")
UNCONDITIONAL = [metric for metric in SAMPLE_METRICS if not metric.unavailable(DIGITS)]
FAST = [metric for metric in UNCONDITIONAL if not metric.thorough]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digits of three splits, sorted by class, as a folder of images would be."""
    splits: dict[str, Any] = {}
    for split, count in {"train": TRAIN, "validation": TEST, "test": TEST}.items():
        images, labels = mnist(split, count)
        order = np.argsort(labels, kind="stable")
        splits[split] = images[order], labels[order]
    return write_images(tmp_path_factory.mktemp("digits") / "digits", **splits)


@pytest.fixture(scope="module")
def folder(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    return save_run(trained_run(digits), tmp_path_factory.mktemp("runs"), step=25)


def test_metrics_are_functions_of_samples_and_features(folder: Path, digits: str) -> None:
    model, dataset = load(folder), Dataset.open(digits)
    before = torch.get_rng_state()
    evaluator = Evaluator(dataset, CONFIG, "test")
    found = evaluator.evaluate(model)
    assert evaluator.evaluate(model).metrics() == found.metrics()
    assert Evaluator(dataset, CONFIG, "test").evaluate(model).metrics() == found.metrics()
    assert torch.equal(torch.get_rng_state(), before)
    train, test = dataset.read("train"), dataset.read("test")
    assert train.label is not None
    reference = ReferenceClassifier.load("mnist")
    real = reference.features(test.image)
    metrics = found.metrics()
    expected = frechet_distance(real, reference.features(model.generate(TEST)))
    assert metrics["frechet"] == pytest.approx(expected, rel=1e-4)
    assert found.fidelity
    baseline = found.fidelity.metrics["frechet"].real_baseline
    assert metrics["frechet_over_baseline"] == metrics["frechet"] / baseline
    bank, queries = principal_components(model.embed(train.image), model.embed(test.image))
    rows = nearest_neighbours(bank, queries, 1)[:, 0]
    accuracy = (train.label[rows] == test.label).mean()  # the SVD depends on the order of images
    assert metrics["knn_1"] == pytest.approx(accuracy, abs=4 / TEST)
    difference = (model.reconstruct(test.image) - test.image.astype(float)) / 255
    assert metrics["reconstruction"] == pytest.approx((difference**2).mean())
    mean = (train.image / 255).mean(0)
    assert found.reconstruction.mean_image == pytest.approx(((test.image / 255 - mean) ** 2).mean())
    assert (found.checkpoint, found.step, found.pairs) == (model.checkpoint, 25, "views")
    assert found.split == "test"
    assert not found.notes


def test_everything_is_chosen_on_the_split_validation(folder: Path, digits: str) -> None:
    dataset = Dataset.open(digits)
    evaluator = Evaluator(dataset, CONFIG)
    held_out = evaluator.images()[1].sorted_by_id().image
    assert np.array_equal(held_out, dataset.read("validation").sorted_by_id().image)
    found = evaluator.evaluate(load(folder))
    assert found.split == "validation"
    assert summary_line(found).endswith("(split validation)")
    assert " over mnist-classifier (" in summary_line(found)


def test_without_a_held_out_split_no_image_is_on_both_sides(make_digits: Any) -> None:
    config = EvaluationConfig(samples=40, images=70)
    evaluator = Evaluator(Dataset.open(make_digits(90)), config)
    train, held_out = evaluator.images()
    assert (len(train.id), len(held_out.id)) == (50, 40)
    assert not set(train.id.tolist()) & set(held_out.id.tolist())
    assert any(
        note.startswith("The data has no split validation: measured on training images.")
        for note in evaluator.notes
    )


def test_fewer_images_for_probes_leave_the_samples_as_many(folder: Path, digits: str) -> None:
    dataset = Dataset.open(digits)
    values, probes = [], []
    for images in (20, TRAIN):
        config = CONFIG.model_copy(update={"images": images})
        found = Evaluator(dataset, config).evaluate(load(folder))
        assert found.fidelity
        assert found.fidelity.count == TEST
        values.append({name: metric.value for name, metric in found.fidelity.metrics.items()})
        probes.append(found.representation["discriminator"]["knn_1"].value)
    assert values[0] == values[1]
    assert probes[0] != probes[1]


def test_a_split_of_few_images_leaves_the_rest(folder: Path, tmp_path: Path) -> None:
    few = write_images(tmp_path / "few", train=mnist("train", 60), validation=mnist("test", 5))
    found = Evaluator(Dataset.open(few), CONFIG).evaluate(load(folder))
    assert found.fidelity is None
    assert found.representation["discriminator"]
    text = "it takes more than 5 images, and there are 5 of the split validation."
    assert text in " ".join(found.notes)


def test_a_missing_split_test_is_replaced_by_validation(tmp_path: Path) -> None:
    data = write_images(tmp_path / "d", train=mnist("train", 60), validation=mnist("test", 30))
    evaluator = Evaluator(Dataset.open(data), EvaluationConfig(reference="mnist"), "test")
    assert evaluator.split == "validation"
    assert "The data has no split test: measured on the split validation." in evaluator.notes[0]


def test_notes_name_what_is_not_measured(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, labels = mnist("train", 120)
    bare = Dataset.open(write_images(tmp_path / "bare", train=(images, [None] * 120)))
    found = Evaluator(bare, EvaluationConfig()).evaluate(load(folder), thorough=True)
    assert found.fidelity is None
    unlabelled = {"alignment", "uniformity", "effective_rank"}
    assert {owner: set(scores) for owner, scores in found.representation.items()} == dict.fromkeys(
        ("discriminator", "encoder", "pixels"), unlabelled
    )
    assert found.metrics().keys() >= {"alignment", "pixels_effective_rank"}
    text = " ".join(found.notes)
    assert "needs a reference's features" in text
    assert "no labels" in text
    letters = [f"letter {number}" for number in range(13)]
    split = images, labels + 3
    renamed = write_images(tmp_path / "letters", classes=letters, train=split, validation=split)
    config = EvaluationConfig(reference="mnist", samples=100, images=100)
    for name in ("PROBE_METRICS", "FEATURE_METRICS"):
        monkeypatch.setattr(evaluate, name, ())
    found = Evaluator(Dataset.open(renamed), config).evaluate(load(folder), thorough=True)
    assert found.fidelity
    assert "classification_accuracy" not in found.fidelity.metrics
    assert found.notes[0] == (
        "Not measured of this data by evaluation.reference 'mnist', which does not name its "
        "classes: accuracy of a classifier trained on them."
    )


def test_probes_use_the_images_that_have_labels(folder: Path, tmp_path: Path) -> None:
    """Their scores are those of the data without the other images."""
    splits: dict[str, Any] = {}
    for split in ("train", "validation"):
        images, labels = mnist(split, TRAIN)
        splits[split] = images, [None if k % 3 == 0 else label for k, label in enumerate(labels)]
    dataset = Dataset.open(write_images(tmp_path / "some", **splits))
    evaluator = Evaluator(dataset, EvaluationConfig(reference="mnist"))
    model = load(folder)
    found = evaluator.evaluate(model)
    parts = []
    for rows in evaluator.images():
        assert rows.label is not None
        known = rows.label != UNLABELLED
        assert known.sum() == 200
        parts += [model.embed(rows.image)[known], rows.label[known]]
    probes = found.representation["discriminator"]
    measured = [metric for metric in PROBE_METRICS if metric.name in probes]
    expected, _ = evaluate_representation(ProbeData(*parts), measured)
    assert {name: score.value for name, score in probes.items()} == {
        name: score.value for name, score in expected.items()
    }
    assert (
        "100 of the 300 images of the split train and 100 of the 300 images of the split "
        "validation have no label: what compares with labels uses the others."
    ) in found.notes


def test_a_split_without_labels_is_not_probed(folder: Path, tmp_path: Path) -> None:
    images, labels = mnist("train", 120)
    splits: dict[str, Any] = {"train": (images, labels), "validation": (images, [None] * 120)}
    dataset = Dataset.open(write_images(tmp_path / "some", **splits))
    config = EvaluationConfig(reference="mnist", samples=100, images=100)
    found = Evaluator(dataset, config).evaluate(load(folder), thorough=True)
    assert found.fidelity
    assert "classification_accuracy" not in found.fidelity.metrics
    unlabelled = {"alignment", "uniformity", "effective_rank"}
    assert set(found.representation["discriminator"]) == unlabelled
    assert "Not measured of this data without labels in the split validation: " in " ".join(
        found.notes
    )


@pytest.fixture(scope="module")
def batches() -> dict[str, RowBatch]:
    return {s: RowBatch(np.arange(600), *mnist(s, 600)) for s in ("train", "test")}


@pytest.fixture(scope="module")
def fidelity(batches: dict[str, RowBatch]) -> FidelityEvaluator:
    return FidelityEvaluator(
        ReferenceClassifier.load("mnist"), batches["train"], batches["test"], count=500
    )


def test_each_metric_is_beside_its_real_data_baseline(
    fidelity: FidelityEvaluator, batches: dict[str, RowBatch]
) -> None:
    train = batches["train"].image[np.random.default_rng(0).permutation(600)[:500]]
    real = fidelity.measure(train, metrics=FAST)
    assert (real.features, real.count) == ("mnist-classifier", 500)
    assert list(real.metrics) == [metric.name for metric in FAST]
    for name, measured in real.metrics.items():
        assert measured.value == pytest.approx(measured.real_baseline, rel=1e-6), name
    mixed = (train // 2 + np.roll(train, 1, 0) // 2).astype(np.uint8)
    worse = fidelity.measure(mixed, metrics=FAST).metrics
    for metric in FAST[:6]:
        loss = worse[metric.name].value - worse[metric.name].real_baseline
        assert (loss < 0) == metric.larger_is_better, metric.name
    assert worse["frechet"].real_baseline == real.metrics["frechet"].real_baseline


def test_a_missing_class_is_seen(fidelity: FidelityEvaluator, batches: dict[str, RowBatch]) -> None:
    images, labels = batches["train"].image, batches["train"].label
    found = fidelity.measure(np.resize(images[labels != 4], (500, 28, 28, 1)), metrics=FAST)
    assert found.histogram is not None
    assert sum(found.histogram) == 500
    assert found.histogram[4] < 5
    balance, entropy = found.metrics["label_balance"], found.metrics["label_entropy"]
    assert balance.value < 0.1 < balance.real_baseline
    assert entropy.value < entropy.real_baseline


def test_baselines_are_of_random_training_images_or_of_all_held_out_ones(
    batches: dict[str, RowBatch],
) -> None:
    """The samples keep their order, and each training image its label."""
    given: dict[str, list[Samples]] = {"train": [], "held_out": []}

    def record(split: str) -> Any:
        def compute(samples: Samples) -> float:
            given[split].append(samples)
            return float(len(given[split]))

        return compute

    fidelity = FidelityEvaluator(
        ReferenceClassifier.load("mnist"), batches["train"], batches["test"], count=50
    )
    metrics: list[Metric[Samples, float]] = [
        Metric("a", "A", record("train"), larger_is_better=True),
        Metric("b", "B", record("held_out"), larger_is_better=True, baseline="held_out"),
    ]
    images, labels = batches["train"].image[:50], np.full(50, 3)
    for _ in range(2):
        found = fidelity.measure(images, labels, metrics)
    assert found.metrics == {"a": MetricValue(3.0, 1.0), "b": MetricValue(3.0, 1.0)}
    assert given["train"][1].images is images
    assert given["train"][1].labels is labels
    drawn = given["train"][0]
    assert drawn.labels is not None
    assert len({image.tobytes() for image in drawn.images}) == 50
    train = batches["train"]
    assert train.label is not None
    pairs = zip(train.image, train.label, strict=True)
    label_of = {image.tobytes(): label for image, label in pairs}
    assert [label_of[image.tobytes()] for image in drawn.images] == drawn.labels.tolist()
    assert not np.array_equal(drawn.images, images)
    assert given["held_out"][0].images is batches["test"].image


def test_the_command_writes_the_table_and_the_file(
    folder: Path, digits: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr("cl_ray.evaluation.clustering._STEPS", 10)
    main(["evaluate", str(folder), "--reference=mnist", f"--samples={TEST}"])
    shown = capsys.readouterr().out
    saved = json.loads((folder / "evaluation.json").read_text())
    assert list(saved["fidelity"]["metrics"]) == [metric.name for metric in UNCONDITIONAL]
    for metric in UNCONDITIONAL:
        values = saved["fidelity"]["metrics"][metric.name]
        row = next(line for line in shown.splitlines() if f" {metric.title} " in line)
        assert f"{values['value']:.4f}" in row
        assert f"{values['real_baseline']:.4f}" in row
    assert saved["representation"].keys() == {"discriminator", "encoder", "pixels"}
    for probe in PROBE_METRICS:
        row = next(line for line in shown.splitlines() if f" {probe.title} " in line)
        for scores in saved["representation"].values():
            assert f"{scores[probe.name]['value']:.2%}" in row
            assert scores[probe.name]["seconds"] >= 0
    for entry in FEATURE_METRICS:
        row = next(line for line in shown.splitlines() if f" {entry.title} " in line)
        for scores in saved["representation"].values():
            assert f"{scores[entry.name]['value']:.4f}" in row
        assert f"measuring: representation: pixels, {entry.title}" in shown
    assert saved["fidelity"]["features"] == "mnist-classifier"
    assert saved["split"] == "test"
    assert "Generation, against the split test" in shown
    assert "trained on pairs by views" in shown
    assert "real-data baseline" in shown
    assert sum(saved["fidelity"]["histogram"]) == TEST
    assert np.isclose(saved["representation"]["pixels"]["knn_1"]["value"], 0.8, atol=0.15)


def test_mistakes_are_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colour = write_images(tmp_path / "colour", train=colour_noise(20))
    for flag, sentence in (
        ("--samples=0", "samples 0 is refused"),
        ("--checkpoint=step-00000099", "there are: step-00000025"),
        ("--data=absent", "absent is not a folder"),
        ("--reference=absent", "There is no reference absent"),
        (f"--data={colour}", "has images of [32, 32, 3]; the run"),
    ):
        assert sentence in refused(capsys, "evaluate", folder, flag)


def test_pixels_of_large_images_are_averaged() -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
    blocks = images.reshape(3, 32, 2, 32, 2, 3).mean((2, 4)) / 255
    assert np.allclose(pixel_features(images), blocks.transpose(0, 3, 1, 2).reshape(3, -1))
    small = images[:, :32, :32]
    assert np.array_equal(pixel_features(small), (small / np.float32(255)).reshape(3, -1))


def test_a_rare_class_costs_only_the_few_labels() -> None:
    random = np.random.default_rng(0)
    labels = np.arange(200) % 4
    features = (np.eye(4)[labels] * 3 + random.standard_normal((200, 4))).astype(np.float32)
    kept = (labels != 2) | (np.cumsum(labels == 2) <= 9)
    data = ProbeData(features[kept], labels[kept], features, labels)
    scores, notes = evaluate_representation(data)
    assert set(scores) == {"knn_1", "knn_20", "linear_probe"}
    assert notes == ["10 labels per class need as many training images: class 2 has 9."]
    assert min(score.seconds for score in scores.values()) > 0
