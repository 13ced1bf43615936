"""What this machine can never do is refused before Ray is started and before a folder is made."""

import os
import shlex
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from helpers.run_folder import leave, trained_run

from cl_ray import cli
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.errors import UserError
from cl_ray.training.launch import LaunchOptions, train
from cl_ray.training.preflight import starts_local_ray
from cl_ray.tuning.prepare import prepare_search

CPUS, GPUS = os.cpu_count() or 1, torch.cuda.device_count()
TOO_MANY = f"more than this machine has, {CPUS}: take at most {CPUS}, or join a cluster"


@pytest.fixture(scope="module")
def digits(make_digits: Any) -> str:
    return make_digits(400)


def refusal(config: Config, storage: Path) -> str:
    config = config.model_copy(update={"storage": str(storage)})
    with pytest.raises(UserError) as refused:
        train(config, LaunchOptions())
    assert not ray.is_initialized()
    assert list(storage.iterdir()) == []
    return str(refused.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"cpus_per_worker": CPUS + 1}, f"cpus_per_worker {CPUS + 1} is {TOO_MANY}"),
        (
            {"workers": CPUS + 1, "batch_size": 4 * (CPUS + 1)},
            f"workers {CPUS + 1} with 1 CPU each need {CPUS + 1} CPU; this machine has {CPUS}: "
            f"take --workers {CPUS}, or",
        ),
        ({"gpus_per_worker": GPUS + 1}, f"gpus_per_worker {GPUS + 1} is more than this machine"),
        ({"checkpoint": {"metric": "foo"}}, "checkpoint.metric 'foo' is not among the metrics of"),
        ({"checkpoint": {"metric": "d/r1"}}, "checkpoint.metric 'd/r1' is not among the metrics"),
    ],
)
def test_it_is_refused_at_once(
    digits: str, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    assert refusal(Config(data=digits, **fields), tmp_path).startswith(words)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(digits: str, tmp_path: Path, device: str) -> None:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if there[device]:
        pytest.skip("it is there")
    told = refusal(Config.from_yaml(f"device: {device}\ndata: {digits}"), tmp_path)
    assert told == f"device '{device}' is not there for this process: use auto, or cpu."


def test_pairs_by_labels_of_one_class(tmp_path: Path) -> None:
    """That the data names two classes does not help."""
    rows = Dataset.open("mnist").read("train", Dataset.open("mnist").pieces("train")[:1])
    pictures = [RawImage(image, 1, f"digit {i}") for i, image in enumerate(rows.image[:80])]
    out = str(tmp_path / "ones")
    write_splits(
        {"train": pictures}, out, DatasetMetadata("ones", "MNIST", classes=["nought", "one"])
    )
    runs = tmp_path / "runs"
    runs.mkdir()
    told = refusal(Config.from_yaml(f"data: {out}\npairs:\n  mode: labels\n"), runs)
    assert told.startswith("pairs.mode `labels` needs two classes, and all images of ")
    assert "are of class 1: use `views`." in told


def test_actors_and_trials(digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = leave(trained_run(digits), tmp_path, 1), tmp_path / "images"
    flags = shlex.join(["generate", str(run), f"--out={out}", f"--cpus-per-actor={CPUS + 1}"])
    with pytest.raises(SystemExit) as ended:
        cli.main(shlex.split(flags))
    assert ended.value.code == 1
    assert f"cpus_per_actor {CPUS + 1} is {TOO_MANY}" in capsys.readouterr().err
    assert not out.exists()
    asked = [f"--data={digits}", f"--storage={tmp_path}/s", f"--cpus-per-trial={CPUS + 1}"]
    with pytest.raises(UserError, match=f"cpus_per_trial {CPUS + 1} is more than this machine"):
        prepare_search(asked, "search")
    assert not (tmp_path / "s").exists()


def test_of_a_cluster_nothing_is_known_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert starts_local_ray(None)
    assert starts_local_ray("local")
    assert not starts_local_ray("auto")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not starts_local_ray(None)
