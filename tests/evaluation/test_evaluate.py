"""A run's evaluation: the measures, on the right images, beside their floors."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.run_folder import leave, trained_run
from numpy.typing import NDArray

from cl_ray.cli import main
from cl_ray.data.dataset import Dataset
from cl_ray.data.sampling import sample_rows
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.errors import UserError
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator, resolve_reference
from cl_ray.evaluation.fidelity import frechet_distance
from cl_ray.evaluation.probes import nearest_neighbours
from cl_ray.evaluation.reference import ReferenceClassifier
from cl_ray.model import TrainedModel, load

TRAIN, TEST = 300, 120
MEASURED = EvaluationConfig(reference="mnist", samples=TEST, images=TRAIN)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digits with a split test, sorted by class, as a folder of images would be."""
    folder = tmp_path_factory.mktemp("digits") / "digits"
    packaged = Dataset.open("mnist")
    splits = {}
    for split, count in {"train": TRAIN, "test": TEST}.items():
        rows = packaged.read(split, packaged.pieces(split)[:1])
        assert rows.label is not None
        order = np.argsort(rows.label[:count], kind="stable")
        splits[split] = [RawImage(rows.image[i], int(rows.label[i]), f"digit {i}") for i in order]
    write_splits(splits, str(folder), DatasetMetadata("digits", "MNIST"))
    return str(folder)


@pytest.fixture(scope="module")
def folder(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    return leave(trained_run(digits), tmp_path_factory.mktemp("runs"), step=25)


class Copyist(TrainedModel):
    """A G that gives the training images back."""

    def generate(self, n: int, seed: int = 0, start: int = 0) -> NDArray[np.uint8]:
        return sample_rows(Dataset.open(self.config.data), "train", TEST, seed).image[
            start : start + n
        ]


def test_the_figures_are_the_measures_of_samples_and_features(folder: Path, digits: str) -> None:
    run, dataset = load(folder), Dataset.open(digits)
    found = Evaluator(dataset, MEASURED).evaluate(run)
    train, test = dataset.read("train"), dataset.read("test")
    assert train.label is not None
    assert test.label is not None
    reference = ReferenceClassifier.load("mnist")
    real = reference.features(test.image)
    metrics = found.metrics()
    expected = frechet_distance(real, reference.features(run.generate(TEST)))
    assert metrics["frechet"] == pytest.approx(expected, rel=1e-4)
    bank, asked = (torch.from_numpy(run.embed(rows.image)) for rows in (train, test))
    right = (
        torch.from_numpy(train.label)[nearest_neighbours(bank, asked, 1)[:, 0]].numpy()
        == test.label
    )
    assert metrics["knn_1"] == pytest.approx(right.mean())
    copies = run.reconstruct(test.image)
    difference = (copies.astype(float) - test.image.astype(float)) / 255
    assert metrics["reconstruction"] == pytest.approx((difference**2).mean())
    mean = (train.image / 255).mean(0)
    assert found.reconstruction.mean_image == pytest.approx(((test.image / 255 - mean) ** 2).mean())
    assert found.pairs == "views"
    assert (found.checkpoint, found.step) == (run.checkpoint, 25)
    assert not found.notes


def test_training_images_for_samples_reach_the_floor(folder: Path, digits: str) -> None:
    """The floor is the same measure, so that a perfect G would stand on it."""
    loaded = load(folder)
    fields = {f.name: getattr(loaded, f.name) for f in dataclasses.fields(loaded)}
    as_many = MEASURED.model_copy(update={"images": TEST})
    found = Evaluator(Dataset.open(digits), as_many).evaluate(Copyist(**fields))
    assert found.fidelity
    for name, figure in found.fidelity.metrics.items():
        assert figure.value == pytest.approx(figure.floor, rel=1e-3, abs=1e-3), name
    assert found.metrics()["frechet_over_floor"] == pytest.approx(1, rel=1e-3)


def test_evaluating_again_finds_the_same_and_moves_no_random_numbers(
    folder: Path, digits: str
) -> None:
    run, dataset = load(folder), Dataset.open(digits)
    before = torch.get_rng_state()
    evaluator = Evaluator(dataset, MEASURED)
    first, second = evaluator.evaluate(run), evaluator.evaluate(run)
    assert first.metrics() == second.metrics()
    assert Evaluator(dataset, MEASURED).evaluate(run).metrics() == first.metrics()
    assert torch.equal(torch.get_rng_state(), before)


def test_rows_are_drawn_once_each_and_from_every_class(digits: str) -> None:
    dataset = Dataset.open(digits)
    few, every = (
        sample_rows(dataset, "train", 60, seed=2),
        sample_rows(dataset, "train", 10_000, seed=2),
    )
    assert len(set(few.id.tolist())) == 60
    assert sorted(every.id.tolist()) == sorted(dataset.read("train").id.tolist())
    assert few.label is not None
    assert len(set(few.label.tolist())) == 10
    again = sample_rows(dataset, "train", 60, seed=2)
    assert few.id.tolist() == again.id.tolist()
    images = dict(zip(every.id.tolist(), every.image, strict=True))
    for number, image in zip(few.id.tolist(), few.image, strict=True):
        assert (images[number] == image).all()


def test_without_a_split_test_no_image_is_on_both_sides(make_digits: Any) -> None:
    dataset = Dataset.open(make_digits(90))
    config = EvaluationConfig(samples=40, images=70)
    train, test = Evaluator(dataset, config).images()
    assert (len(train.id), len(test.id)) == (50, 40)
    assert not set(train.id.tolist()) & set(test.id.tolist())


def test_what_could_not_be_measured_is_said(folder: Path, tmp_path: Path, make_digits: Any) -> None:
    rows = Dataset.open(make_digits(90)).read("train")
    pictures = [RawImage(image, None, "") for image in rows.image]
    write_splits({"train": pictures}, str(tmp_path / "bare"), DatasetMetadata("bare", "MNIST"))
    found = Evaluator(Dataset.open(str(tmp_path / "bare")), EvaluationConfig()).evaluate(
        load(folder), thorough=True
    )
    assert found.fidelity is None
    assert found.representation == {}
    text = " ".join(found.notes)
    assert "needs a reference's features" in text
    assert "no labels" in text
    assert "no split test" in text
    with pytest.raises(UserError, match="There is no reference"):
        Evaluator(Dataset.open("mnist"), EvaluationConfig(reference="absent.safetensors"))


def test_a_reference_of_other_classes_judges_no_labels(
    folder: Path, tmp_path: Path, make_digits: Any
) -> None:
    rows = Dataset.open(make_digits(120)).read("train")
    assert rows.label is not None
    splits = {
        split: [RawImage(x, int(y) + 3, "") for x, y in zip(rows.image, rows.label, strict=True)]
        for split in ("train", "test")
    }
    names = [f"letter {number}" for number in range(13)]
    write_splits(
        splits, str(tmp_path / "letters"), DatasetMetadata("letters", "MNIST", classes=names)
    )
    config = EvaluationConfig(reference="mnist", samples=100, images=100)
    found = Evaluator(Dataset.open(str(tmp_path / "letters")), config).evaluate(
        load(folder), thorough=True
    )
    assert found.fidelity
    assert "classification_accuracy" not in found.fidelity.metrics
    assert any("the reference tells other classes apart" in note for note in found.notes)


def test_only_digits_of_its_size_are_given_to_the_packaged_reference(tmp_path: Path) -> None:
    larger = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 1), np.uint8)
    pictures = [RawImage(image, 0, "") for image in larger]
    write_splits({"train": pictures}, str(tmp_path / "mnist"), DatasetMetadata("mnist", "noise"))
    assert resolve_reference(Dataset.open("mnist"), "auto") == "mnist"
    assert resolve_reference(Dataset.open(str(tmp_path / "mnist")), "auto") is None


def test_as_many_rows_as_asked_are_drawn_of_however_small_groups(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = np.random.default_rng(0).integers(0, 256, (400, 64, 64, 3), np.uint8)
    pictures = [RawImage(image, None, "") for image in large]
    write_splits({"train": pictures}, str(tmp_path / "large"), DatasetMetadata("large", "noise"))
    dataset = Dataset.open(str(tmp_path / "large"))
    assert len(dataset.pieces("train")) >= 5
    monkeypatch.setattr("cl_ray.data.sampling.GROUPS", 2)
    assert len(set(sample_rows(dataset, "train", 350, seed=0).id.tolist())) == 350
    few = sample_rows(dataset, "train", 20, seed=0).id
    assert len(few) == 20


def test_the_command_writes_the_table_and_the_file(
    folder: Path, digits: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    main(["evaluate", str(folder), "--reference=mnist", f"--samples={TEST}"])
    shown = capsys.readouterr().out
    saved = json.loads((folder / "evaluation.json").read_text())
    metrics = saved["fidelity"]["metrics"]
    assert {"frechet", "recall", "classification_accuracy", "label_balance"} <= metrics.keys()
    for figure in metrics.values():
        assert f"{figure['value']:.4f}" in shown
        assert f"{figure['floor']:.4f}" in shown
    assert saved["representation"].keys() == {"discriminator", "encoder", "pixels"}
    for scores in saved["representation"].values():
        assert f"{scores['knn_1']['accuracy']:.2%}" in shown
    assert "learnt from pairs by views" in shown
    assert sum(saved["fidelity"]["histogram"]) == TEST
    assert np.isclose(saved["representation"]["pixels"]["knn_1"]["accuracy"], 0.8, atol=0.15)


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--samples=0"], "samples 0 is refused"),
        (["--checkpoint=step-00000099"], "there are: step-00000025"),
        (["--data=absent"], "absent is not a folder"),
        (["--reference=absent"], "There is no reference absent"),
    ],
)
def test_mistakes_are_one_sentence(
    folder: Path, flags: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        main(["evaluate", str(folder), *flags])
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert sentence in said
    assert said.count("\n") == 1


def test_images_of_another_shape_are_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    colour = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), np.uint8)
    write_splits(
        {"train": [RawImage(image, 0, "") for image in colour]},
        str(tmp_path / "colour"),
        DatasetMetadata("colour", "noise"),
    )
    with pytest.raises(SystemExit):
        main(["evaluate", str(folder), f"--data={tmp_path / 'colour'}"])
    assert "has images of [32, 32, 3]; the run" in capsys.readouterr().err
