"""The reference of labelled data: trained once, kept beside them, and used by `cl-ray evaluate`."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import write_images
from helpers.random_images import colour_noise as noise
from helpers.refusal import refused
from helpers.run_folder import save_run, trained_run

from cl_ray.cli import main
from cl_ray.data import writer
from cl_ray.data.dataset import UNLABELLED, Dataset, sample_rows
from cl_ray.errors import UserError
from cl_ray.evaluation import reference_cache as module
from cl_ray.evaluation import reference_name
from cl_ray.evaluation.reference import ReferenceClassifier, train_reference
from cl_ray.evaluation.reference_cache import (
    automatic_config,
    cached_reference,
    trained_images,
)
from cl_ray.evaluation.reference_name import needs_training, resolve_reference
from cl_ray.tuning.search import prepare_search


@pytest.fixture
def colours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    monkeypatch.setattr(module, "_SEEN", 720)
    monkeypatch.setattr("cl_ray.evaluation.clustering._STEPS", 10)
    monkeypatch.setattr(writer, "GROUP_BYTES", 1)  # row groups of 64 images
    train, validation, test = noise(240), noise(60, seed=2), noise(60, seed=1)
    data = write_images(tmp_path / "noise", train=train, validation=validation, test=test)
    return Dataset.open(data)


def test_it_is_trained_once_and_kept_by_the_fingerprint(colours: Dataset, tmp_path: Path) -> None:
    steps: list[str] = []
    said: list[str] = []
    place = f"{colours.location}.reference"
    path = cached_reference(colours, [place], steps.append, said.append)
    assert path == f"{place}/{colours.info.fingerprint}.safetensors"
    reference = ReferenceClassifier.load(path)
    metadata = reference.metadata
    assert reference.name == "noise-classifier"
    assert metadata.config == automatic_config(colours)
    assert (metadata.measured_on, metadata.images) == ("test", 60)
    assert metadata.accuracy > 0.9
    assert "reference classifier: epoch 3 of 3" in steps[-1]
    assert said[0].startswith("Training a reference classifier on 240 labelled images")
    assert f"{metadata.accuracy:.2%} of 60 test images correct" in said[1]
    assert said[2] == f"It is kept as {path}."
    blob = Path(path).read_bytes()
    steps.clear()
    said.clear()
    assert cached_reference(colours, [str(tmp_path), place], steps.append, said.append) == path
    assert not steps
    assert said == [
        f"Reference classifier {path}: {metadata.accuracy:.2%} of 60 test images correct."
    ]
    Path(path).write_bytes(blob[:-50])
    cached_reference(colours, [place], say=said.append)
    assert "is damaged, so it is trained anew" in said[1]
    assert Path(path).read_bytes() == blob


def test_another_version_or_other_images_have_another_one(
    colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cached_reference(colours, [str(tmp_path)])
    data = write_images(tmp_path / "other", train=noise(40, seed=5))
    other = cached_reference(Dataset.open(data), [str(tmp_path)])
    assert other != path
    assert ReferenceClassifier.load(other).metadata.measured_on == "held out"
    said: list[str] = []
    monkeypatch.setattr(module, "_SEEN", 480)
    assert cached_reference(colours, [str(tmp_path)], say=said.append) == path
    assert "is of another version, so it is trained anew" in said[0]
    assert ReferenceClassifier.load(path).metadata.config.epochs == 2


def test_a_folder_that_cannot_be_written_is_said(colours: Dataset, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("a file")
    said: list[str] = []
    path = cached_reference(colours, [f"{taken}/x", f"{tmp_path}/run"], say=said.append)
    assert path.startswith(f"{tmp_path}/run/")
    assert said[0] == f"The reference cannot be kept in {taken}/x: File exists."
    with pytest.raises(UserError, match="can be kept in none of"):
        cached_reference(colours, [f"{taken}/x"])


def test_two_commands_train_it_once(
    colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, waits = [], threading.Event()

    def train_when_the_other_waits(*arguments: Any) -> ReferenceClassifier:
        assert waits.wait(60)
        trained.append(arguments)
        return train_reference(*arguments)

    def tell(step: str) -> None:
        if step.startswith("waiting for another command"):
            waits.set()

    monkeypatch.setattr(module, "train_reference", train_when_the_other_waits)
    with ThreadPoolExecutor(2) as pool:
        both = [pool.submit(cached_reference, colours, [str(tmp_path)], tell) for _ in range(2)]
        found = [each.result() for each in both]
    assert len(trained) == 1
    assert found[0] == found[1]


def test_which_data_need_one_and_of_how_many_images(
    colours: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, _ = noise(40)
    bare = Dataset.open(write_images(tmp_path / "bare", train=(images, [None] * 40)))
    few = Dataset.open(write_images(tmp_path / "few", train=noise(40), test=noise(4)))
    assert needs_training(colours)
    assert not any(map(needs_training, (bare, few, Dataset.open("mnist"))))
    assert trained_images(colours) == 240
    images, labels = noise(90)
    some = [label if k % 9 == 0 else None for k, label in enumerate(labels)]
    partly = Dataset.open(write_images(tmp_path / "partly", train=(images, some), test=noise(20)))
    assert trained_images(partly) == 10
    rows = sample_rows(partly, "train", 7, seed=0, labelled=True)
    assert rows.label is not None
    assert (len(rows.id), (rows.label == UNLABELLED).sum()) == (7, 0)
    monkeypatch.setattr(module, "_BYTES", 32 * 32 * 3 * 100)
    assert trained_images(colours) == 100
    large = Dataset.open(write_images(tmp_path / "large", train=noise(40, side=64)))
    assert automatic_config(large).stride == 4


def test_a_search_trains_it_of_all_images_and_finds_it(
    colours: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = [f"--data={colours.location}", f"--storage={tmp_path}", "--set=pairs.candidates=8"]
    flags += ["--set=batch_size=16", "--metric=frechet"]
    with pytest.raises(UserError, match="without a reference"):
        prepare_search(flags, "tune")  # 240 images are few
    assert resolve_reference(colours, "auto") is None
    monkeypatch.setattr(reference_name, "_LEAST_IMAGES", 240)
    search = prepare_search([*flags, "--images=100"], "tune")
    path = f"{colours.location}.reference/{colours.info.fingerprint}.safetensors"
    assert search.trial_config.evaluation.reference == path
    assert search.config.evaluation.reference == "auto"
    assert search.dataset.info.fingerprint != colours.info.fingerprint
    assert "was trained on 240 labelled images" in capsys.readouterr().out
    assert resolve_reference(colours, "auto") == path
    elsewhere = replace(colours, location="s3://bucket/data")
    assert resolve_reference(elsewhere, "auto") is None


def test_mistakes_are_told_before_it_is_trained(
    colours: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(reference_name, "_LEAST_IMAGES", 240)
    place = [f"--data={colours.location}", f"--storage={tmp_path}/runs"]
    said = refused(capsys, "train", *place, "--checkpoint.metric=evaluation/fid")
    assert "'evaluation/fid' is not measured during training for" in said
    assert "evaluation/frechet" in said  # which it would have
    refused(capsys, "tune", *place, "--metric=fid")
    assert not Path(f"{colours.location}.reference").exists()
    assert not (tmp_path / "runs").exists()


def test_evaluate_trains_it_without_being_asked(
    colours: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save_run(trained_run(colours.location), tmp_path / "runs", step=7)
    main(["evaluate", str(folder)])
    printed = capsys.readouterr().out
    assert "A reference classifier of the 3 classes was trained on 240 labelled images" in printed
    assert f"It is kept as {colours.location}.reference/" in printed
    fidelity = json.loads((folder / "evaluation.json").read_text())["fidelity"]
    assert fidelity["features"] == "noise-classifier"
    assert fidelity["metrics"].keys() >= {"frechet", "precision", "classification_accuracy"}
    alike = write_images(tmp_path / "alike", train=(noise(40)[0], [0] * 40))
    main(["evaluate", str(folder), f"--data={alike}"])
    assert "No reference classifier: " in capsys.readouterr().out
    assert json.loads((folder / "evaluation.json").read_text())["fidelity"] is None
