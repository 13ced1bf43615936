"""Mistakes are reported before Ray starts, and leave the storage as it was."""

import errno
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import ray
import torch
from helpers.datasets import mnist, write_images
from helpers.refusal import refused
from helpers.run_folder import save_run, trained_run
from rich.console import Console

from cl_ray import LaunchOptions, train
from cl_ray.config import Config
from cl_ray.data.config import LabelConfig
from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.environment import usable_cpus
from cl_ray.errors import UserError
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer
from cl_ray.training.preflight import (
    check_outlives_job,
    check_pairs,
    exclusive_lock,
    few_steps_note,
    resolve_reference_path,
    run_notes,
    starts_local_ray,
)
from cl_ray.tuning.search import prepare_search

CPUS, GPUS = usable_cpus(), torch.cuda.device_count()
TOO_MANY = f"more than this machine has, {CPUS}: take at most {CPUS}, or join a cluster"


@pytest.fixture(scope="module")
def digits(make_digits: Any) -> str:
    return make_digits(400)


def refusal(config: Config, storage: Path) -> str:
    config = config.model_copy(update={"storage": str(storage)})
    with pytest.raises(UserError) as refused:
        train(config)
    assert not ray.is_initialized()
    assert list(storage.iterdir()) == []
    return str(refused.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data=nowhere", "nowhere"),
        ("--storage=/proc/runs", "storage '/proc/runs' cannot be written"),
        ("--pairs.candidates=400", "pairs.candidates 400 must be less than the number of images"),
        (
            "--pairs.candidates=20 --shards.memory=1e-6 --shards.window=16",
            "pairs.candidates 20 needs more than the 16 images of a window",
        ),
        ("--config=nowhere.yaml", "Cannot read the config nowhere.yaml"),
        (f"--cpus-per-worker={CPUS + 1}", f"cpus_per_worker {CPUS + 1} is {TOO_MANY}"),
        (
            f"--workers={CPUS + 1} --batch-size={4 * (CPUS + 1)}",
            f"workers {CPUS + 1} with 1 CPU each need {CPUS + 1} CPU; this machine has {CPUS}: "
            f"take --workers {CPUS}, or a smaller --cpus-per-worker.",
        ),
        (f"--gpus-per-worker={GPUS + 1}", f"gpus_per_worker {GPUS + 1} is more than this machine"),
        ("--checkpoint.metric=d/r1", "checkpoint.metric 'd/r1' is not among the metrics of an"),
        (
            "--checkpoint.metric=evaluation/frechet --evaluation.every=0",
            "checkpoint.metric 'evaluation/frechet' is of an evaluation, and evaluation.every 0",
        ),
    ],
)
def test_what_cannot_run_is_refused(
    flags: str, message: str, digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = [f"--storage={tmp_path}", f"--data={digits}", "--epochs=1"]
    assert refused(capsys, "train", *known, *flags.split()).startswith(message)
    assert not ray.is_initialized()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_not_there(digits: str, tmp_path: Path, device: str) -> None:
    if {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}[device]:
        pytest.skip("it is there")
    message = refusal(Config.from_yaml(f"device: {device}\ndata: {digits}"), tmp_path)
    assert message == f"device '{device}' is not available to this process: use auto or cpu."


def test_pairs_by_labels_of_one_class(tmp_path: Path) -> None:
    """Also of data that names two classes."""
    images, runs = mnist("train", 80)[0], tmp_path / "runs"
    out = write_images(tmp_path / "ones", classes=["zero", "one"], train=(images, [1] * 80))
    runs.mkdir()
    message = refusal(Config.from_yaml(f"data: {out}\npairs:\n  mode: labels\n"), runs)
    assert message.startswith("pairs.mode `labels` needs two classes, and all images of ")
    assert "are of class 1: use `views`." in message


def test_unlabelled_training_images(tmp_path: Path) -> None:
    pixels, labels = mnist("train", 80)
    some = [None if k % 2 else label for k, label in enumerate(labels)]
    data = write_images(tmp_path / "some", train=(pixels, some), validation=(pixels, labels))
    runs = tmp_path / "runs"
    runs.mkdir()
    message = refusal(Config.from_yaml(f"data: {data}\ncondition: projection\n"), runs)
    assert "needs a label for each training image, and 40 of the 80 of" in message
    assert "`cl-ray data --unlabelled drop`" in message
    dataset = Dataset.open(data)
    config = Config.from_yaml(f"data: {data}\npairs:\n  mode: labels\n")
    check_pairs(config, dataset)
    assert run_notes(config, dataset)[1].startswith("40 of the 80 training images have no label")
    bare = write_images(tmp_path / "bare", train=(pixels, [None] * 80), test=(pixels, labels))
    config = Config.from_yaml(f"data: {bare}\npairs:\n  mode: labels\n")
    assert "has none: use `views`" in refusal(config, runs)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"condition": "none"}, "labels.count 9 has no effect, as the training uses no labels"),
        ({"condition": "projection"}, "and condition `projection` scores each image by its class"),
        ({"labels": {"count": 401}}, "labels.count 401 is more than the 400 training images of "),
        ({}, "labels.count 9 is less than one for each of the 10 classes of "),
        ({"condition": "none", "pairs": {"mode": "labels"}}, "labels.count 9 is less than one"),
    ],
)
def test_labels_that_cannot_be_drawn(
    digits: str, tmp_path: Path, fields: dict[str, Any], words: str
) -> None:
    fields = {"data": digits, "condition": "classifier", "labels": {"count": 9}} | fields
    assert words in refusal(Config.model_validate(fields), tmp_path)


def test_notes_say_which_labels_are_used(digits: str, tmp_path: Path) -> None:
    config = Config(data=digits, condition="classifier", labels=LabelConfig(count=25, seed=4))
    dataset = Dataset.open(digits)
    check_pairs(config, dataset)
    assert run_notes(config, dataset)[1:] == [
        "25 of the 400 training images keep their label, 2 to 3 of each class (labels.seed 4).",
        "375 of the 400 training images have no label: G is given the classes that D predicts for "
        "them.",
    ]
    pixels, labels = mnist("train", 80)
    some = [None if k % 2 else label for k, label in enumerate(labels)]
    data = write_images(tmp_path / "some", train=(pixels, some))
    config = Config(data=data, condition="classifier")
    check_pairs(config, Dataset.open(data))
    assert run_notes(config, Dataset.open(data))[1].startswith("40 of the 80 training images have")


def test_a_run_of_few_steps_names_the_epochs_that_are_enough(digits: str) -> None:
    dataset = Dataset.open(digits)
    config = Config.from_yaml(f"data: {digits}\nbatch_size: 32\nepochs: 3\n")  # 400 images
    assert run_notes(config, dataset) == [
        "The run has 39 steps in 3 epochs, and G learns little in fewer than 300: `--epochs 24` "
        "reaches that."
    ]
    config = config.model_copy(update={"epochs": 24})
    assert run_notes(config, dataset) == ["The run has 312 steps in 24 epochs."]
    assert "`--epochs 24` reaches" in few_steps_note(299, 23)
    assert not few_steps_note(300, 150)


def test_actors_and_trials(digits: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = save_run(trained_run(digits), tmp_path, 1), tmp_path / "images"
    message = refused(capsys, "generate", run, f"--out={out}", f"--cpus-per-actor={CPUS + 1}")
    assert f"cpus_per_actor {CPUS + 1} is {TOO_MANY}" in message
    assert not out.exists()
    flags = [f"--data={digits}", f"--storage={tmp_path}/s", f"--cpus-per-trial={CPUS + 1}"]
    with pytest.raises(UserError, match=f"cpus_per_trial {CPUS + 1} is more than this machine"):
        prepare_search(flags, "search")
    assert not (tmp_path / "s").exists()


def test_a_cluster_is_not_checked_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert starts_local_ray(None)
    assert starts_local_ray("local")
    assert not starts_local_ray("auto")
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert not starts_local_ray(None)


@pytest.mark.parametrize(
    ("command", "flag"),
    [
        ("train --storage=runs", "storage"),
        ("train", "storage"),
        ("tune --storage=runs", "storage"),
        ("data --source=stacked-mnist --out=data/stacked", "out"),
        ("generate {run} --out=digits", "out"),
        ("embed {run} --out=test.parquet", "out"),
        ("export {run} --out=model", "out"),
    ],
)
def test_a_job_writes_nothing_into_rays_copy_of_its_directory(
    command: str,
    flag: str,
    trainer: Trainer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, copy = save_run(trainer, tmp_path, 2), tmp_path / "runtime_resources/_ray_pkg_1"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    for text in (command, command.replace(f"--{flag}=", f"--{flag}={copy}/")):
        message = refused(capsys, *text.format(run=run).split())
        assert message.startswith(f"{flag} '")
        assert "would lie in Ray's copy of the job's working directory" in message
        assert message.endswith("or an absolute path that every machine mounts.")
    assert list(copy.iterdir()) == []


def test_a_relative_reference_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("run", "mnist", "w.pt"):
        (tmp_path / name).mkdir()
    for given, kept in {
        "run": f"{tmp_path}/run",
        "./mnist": f"{tmp_path}/mnist",
        "transformers:run": f"transformers:{tmp_path}/run",
        "inception:../" + tmp_path.name + "/w.pt": f"inception:{tmp_path}/w.pt",
        **{name: name for name in ("auto", "none", "mnist", "torchvision:run", "a" * 300)},
        **{name: name for name in ("transformers:a/b", "s3://bucket/run", f"{tmp_path}/run")},
    }.items():
        config = Config(evaluation=EvaluationConfig(reference=given))
        assert resolve_reference_path(config).evaluation.reference == kept


def test_a_job_may_write_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    for location in (f"{tmp_path}/runs", "s3://bucket/runs", "~/runs"):
        check_outlives_job(location, "storage")
    with pytest.raises(UserError, match=r"^storage 'runs'"):
        check_outlives_job("runs", "storage")
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR")
    check_outlives_job("runs", "storage")


# Resuming


def delete(folder: Path, pattern: str) -> None:
    found = list(folder.glob(pattern))
    assert found
    for file in found:
        file.unlink()


@pytest.fixture(scope="module")
def trainer(make_digits: Any) -> Trainer:
    return trained_run(make_digits(40))


@pytest.fixture
def config(trainer: Trainer) -> Config:
    assert isinstance(trainer.config, Config)
    return trainer.config


def attempt(config: Config, storage: Path) -> tuple[str, str]:
    """What `train` prints of neither name nor steps, and its error, with an unknown address."""
    console = Console(width=60)
    config = config.model_copy(update={"storage": str(storage), "name": "demo"})
    with console.capture() as printed, pytest.raises(UserError) as ended:
        train(config, LaunchOptions(address="nonsense"), console)
    lines = printed.get().splitlines(keepends=True)
    notes = [line for line in lines if not line.startswith(("Run ", "The run has "))]
    return "".join(notes), str(ended.value)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.yaml", "has checkpoints and no config.yaml"),
        (
            "checkpoints/*/manifest.json",
            "is damaged: none of its checkpoints (step-00000001, step-00000002) has a complete "
            "manifest.json",
        ),
    ],
)
def test_a_damaged_run_is_not_started_again(
    trainer: Trainer, config: Config, tmp_path: Path, missing: str, message: str
) -> None:
    save_run(trainer, tmp_path, 1)
    folder = save_run(trainer, tmp_path, 2)
    assert "Cannot join" in attempt(config, tmp_path)[1]  # complete, it is resumed
    delete(folder, missing)
    before = sorted(folder.rglob("*"))
    printed, error = attempt(config, tmp_path)
    assert printed == ""
    assert message in error
    assert error.startswith(f"The run {folder} ")
    assert error.endswith(": put back what is missing, or take another --name.")
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "is not the config of a run: it is empty"),
        (b"\xff\xfe\x00", "is not YAML"),
        (b"epochs: 3\n", "is not the config of a run: it has no field 'preset'"),
        (b"format_version: 1\n", "was written by an earlier version of cl_ray (format 1)"),
    ],
)
def test_a_foreign_config_is_refused_and_left(
    trainer: Trainer,
    config: Config,
    tmp_path: Path,
    text: bytes,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = save_run(trainer, tmp_path, 2) / "config.yaml"
    file.write_bytes(text)
    error = refused(capsys, "train", "--name=demo", f"--storage={tmp_path}")
    assert error.startswith(f"{file} {message}")
    assert attempt(config, tmp_path)[1] == error
    assert file.read_bytes() == text


def test_the_config_of_another_run_is_refused(
    trainer: Trainer, config: Config, tmp_path: Path
) -> None:
    other = config.model_copy(update={"seed": 5, "epochs": 9})
    file = save_run(trainer, tmp_path, 2) / "config.yaml"
    file.write_text(other.to_yaml())
    assert attempt(other, tmp_path)[1] == (
        f"{file} is not what step-00000002 was trained with (seed was 0, now 5): put back the "
        "run's own, or take another --name."
    )
    assert file.read_text() == other.to_yaml()


def test_other_images_are_refused(
    trainer: Trainer, config: Config, tmp_path: Path, make_digits: Any
) -> None:
    """Also at the same place, and with as many images and the same classes."""
    save_run(trainer, tmp_path, 2)
    data = Path(config.data)
    before = tmp_path / "before"
    data.rename(before)
    try:
        data.symlink_to(before)  # the same images elsewhere
        assert "Cannot join" in attempt(config, tmp_path)[1]
        moved = config.model_copy(update={"data": str(before)})
        assert "Cannot join" in attempt(moved, tmp_path)[1]
        data.unlink()
        images = [RawImage(i, 0, "digit") for i in Dataset.open(str(before)).read("train").image]
        images[0].image[0, 0, 0] ^= 1
        write_splits({"train": images}, str(data), DatasetMetadata("digits", "MNIST"))
        error = attempt(config, tmp_path)[1]
        assert error.startswith(f"{data} has other images or classes than it was started on (")
        assert error.endswith(": give the same data, or take another --name.")
    finally:
        shutil.rmtree(data) if not data.is_symlink() else data.unlink()
        before.rename(data)


def test_a_first_checkpoint_that_is_incomplete(
    trainer: Trainer, config: Config, tmp_path: Path
) -> None:
    """The run starts again, unless other files show that the checkpoint was complete once."""
    folder = save_run(trainer, tmp_path, 2)
    delete(folder, "checkpoints/*/manifest.json")
    damaged = "is damaged: none of its checkpoints (step-00000002)"
    assert damaged in attempt(config, tmp_path)[1]
    (folder / "checkpoints" / "best.txt").unlink()
    (folder / "generator.safetensors").write_bytes(b"weights")
    assert damaged in attempt(config, tmp_path)[1]
    (folder / "generator.safetensors").unlink()
    printed, error = attempt(config, tmp_path)
    assert printed.startswith(f"The run {folder} has no checkpoint yet and starts again")
    assert "Cannot join" in error


def test_a_run_that_starts_again_prints_what_has_changed(
    trainer: Trainer, config: Config, tmp_path: Path
) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    assert attempt(config, tmp_path)[0] == ""  # there was no attempt yet
    (folder / "config.yaml").write_text(config.to_yaml())
    same = (
        f"The run {folder} has no checkpoint yet and starts again, with the settings of its "
        "config.yaml"
    )
    assert attempt(config, tmp_path)[0] == f"{same}.\n"
    other = config.model_copy(update={"seed": 5, "epochs": 9})
    assert attempt(other, tmp_path)[0] == f"{same}, but seed was 0, now 5; epochs was 1, now 9.\n"
    save_run(trainer, tmp_path, 2)
    printed, error = attempt(other, tmp_path)
    assert printed == ""
    assert (
        "was started with other settings (seed was 0, now 5): leave those out to resume it" in error
    )


# The lock

HOLD = """
import sys
from cl_ray.storage import RunStorage
from cl_ray.training.preflight import exclusive_lock
with exclusive_lock(RunStorage.from_uri(sys.argv[1]), "search"):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_the_process_that_holds_the_lock_of_a_folder_in_a_bucket_is_named(bucket: Any) -> None:
    """By the processes of one machine; test_launch.py has one in a local folder."""
    uri = bucket.uri("held/s")
    folder = RunStorage.from_uri(uri)
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError) as caught, exclusive_lock(folder, "run"):
        pass
    assert str(caught.value) == (
        f"The run {folder} is in use by another process (process {holder.pid} on "
        f"{socket.gethostname()}): wait for it or stop it, or use another --name."
    )
    holder.communicate()
    with exclusive_lock(folder, "run"), pytest.raises(UserError), exclusive_lock(folder, "run"):
        pass


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is used without one; any other error is raised."""

    def fail(code: int) -> Callable[..., None]:
        def acquire(*_: Any) -> None:
            raise OSError(code, os.strerror(code))

        return acquire

    monkeypatch.setattr(filelock.FileLock, "acquire", fail(errno.ENOLCK))
    with exclusive_lock(RunStorage.at(str(tmp_path), ""), "run"):
        pass
    monkeypatch.setattr(filelock.FileLock, "acquire", fail(errno.EACCES))
    with pytest.raises(PermissionError), exclusive_lock(RunStorage.at(str(tmp_path), ""), "run"):
        pass
