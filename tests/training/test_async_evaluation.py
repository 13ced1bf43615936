"""Evaluations beside the training or in between give the same metrics and the same weights."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from helpers.commands import read_metrics
from helpers.commands import train_here as train
from helpers.run_folder import build_trainer
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config
from cl_ray.step_log import StepLog
from cl_ray.storage import RunStorage

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]
FLAGS = ["--epochs=3", "--threads=1", "--evaluation.reference=mnist"]


def evaluated(folder: Path) -> dict[int, dict[str, float]]:
    """The evaluations' metrics by epoch."""
    found = {}
    for line in read_metrics(folder):
        metrics = {k: v for k, v in line.items() if k.startswith("evaluation/")}
        metrics.pop("evaluation/seconds", None)
        if metrics:
            found[line["epoch"]] = metrics
    return found


@pytest.fixture(scope="module")
def digits(make_digits: Any) -> str:
    return make_digits(700)


@pytest.fixture(scope="module")
def between(tmp_path_factory: pytest.TempPathFactory, digits: str) -> tuple[Path, str]:
    """A run whose worker has all CPUs."""
    folder = tmp_path_factory.mktemp("runs") / "between"
    return folder, train(folder, digits, *FLAGS)


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory, digits: str) -> tuple[Path, str]:
    """A run whose worker leaves a CPU."""
    folder = tmp_path_factory.mktemp("runs") / "beside"
    return folder, train(folder, digits, *FLAGS, "--cpus-per-worker=1")


def test_without_a_free_cpu_every_epoch_is_evaluated_in_between(between: tuple[Path, str]) -> None:
    folder, printed = between
    assert "evaluations interrupt the training" in printed
    found = evaluated(folder)
    assert sorted(found) == [1, 2, 3]
    assert printed.count("evaluation: Fréchet distance") == 3
    summary = json.loads((folder / "summary.json").read_text())
    assert {f"evaluation/{k}": v for k, v in summary["evaluation"].items()} == found[3]
    assert json.loads((folder / "evaluation.json").read_text())["step"] == 66
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    curve = events.Scalars("evaluation/frechet")
    assert [(e.step, e.value) for e in curve] == [
        (22 * epoch, pytest.approx(found[epoch]["evaluation/frechet"])) for epoch in (1, 2, 3)
    ]


def test_the_smallest_distance_selects_the_best_checkpoint(between: tuple[Path, str]) -> None:
    folder, _ = between
    distances = {22 * e: f["evaluation/frechet"] for e, f in evaluated(folder).items()}
    best = min(distances, key=distances.__getitem__)
    assert (folder / "checkpoints" / "best.txt").read_text() == f"step-{best:08d}\n"


def test_beside_the_training_the_metrics_are_the_same(
    beside: tuple[Path, str], between: tuple[Path, str]
) -> None:
    folder, printed = beside
    assert "interrupt" not in printed
    ours, theirs = evaluated(folder), evaluated(between[0])
    assert 3 in ours  # the last is always evaluated
    for epoch, metrics in ours.items():
        assert metrics == pytest.approx(theirs[epoch], rel=1e-4, abs=1e-6)
    left_out = {1, 2, 3} - ours.keys()
    for epoch in left_out:
        assert f"epoch {epoch} is not evaluated" in printed


def test_evaluation_changes_nothing_of_what_is_trained(
    beside: tuple[Path, str], between: tuple[Path, str]
) -> None:
    for file in ("generator.safetensors", "discriminator.safetensors"):
        ours, theirs = (safetensors.torch.load_file(f / file) for f, _ in (beside, between))
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Killed(Exception):
    """Ends the training within an epoch."""


def test_a_run_killed_within_the_next_epoch_is_evaluated_when_resumed(
    between: tuple[Path, str], digits: str
) -> None:
    folder, _ = between
    found, lines = evaluated(folder), read_metrics(folder)[:2]
    lines[1] = {k: v for k, v in lines[1].items() if not k.startswith("evaluation/")}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    for file in ("summary.json", "evaluation.json"):
        (folder / file).unlink()
    shutil.rmtree(folder / "checkpoints" / "step-00000066")
    config = Config.load(folder / "config.yaml")
    fields = config.model_dump() | {"checkpoint": {"every": 50}}
    trainer = build_trainer(**fields)
    checkpoints = CheckpointStore(*RunStorage.from_uri(folder).open())
    trainer.load_state_dict(checkpoints.load("step-00000044"))

    def save(log: StepLog) -> None:
        if log.step == 50:
            checkpoints.save(trainer.state_dict(), epoch=2, step=50)
            raise Killed

    with pytest.raises(Killed):
        trainer.train_epoch(save)
    train(folder, digits, *FLAGS)
    again = evaluated(folder)
    assert again.keys() == found.keys()
    for epoch in (1, 2):
        assert again[epoch] == pytest.approx(found[epoch], rel=1e-4)
    assert json.loads((folder / "evaluation.json").read_text())["step"] == 66


def test_a_run_killed_before_its_summary_has_its_last_metrics(
    between: tuple[Path, str], digits: str
) -> None:
    folder, _ = between
    (folder / "summary.json").unlink()
    train(folder, digits, *FLAGS)
    summary, last = json.loads((folder / "summary.json").read_text()), read_metrics(folder)[-1]
    assert summary["status"] == "finished"
    assert summary["metrics"]["g/reconstruction"] == last["g/reconstruction"]
    assert summary["evaluation"]["frechet"] == last["evaluation/frechet"]


def test_going_back_to_an_earlier_checkpoint_leaves_nothing_of_later_epochs(
    between: tuple[Path, str], digits: str
) -> None:
    folder, _ = between
    train(folder, digits, *FLAGS[1:], "--epochs=2", "--from-checkpoint=step-00000044")
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (2, 44)
    assert [line["epoch"] for line in read_metrics(folder)] == [1, 2]
    assert sorted(file.name[-8:-4] for file in (folder / "samples").iterdir()) == 2 * [
        "0001"
    ] + 2 * ["0002"]
    assert not (folder / "evaluation.json").exists()  # of epoch 3
    ours, theirs = (
        safetensors.torch.load_file(place / "generator.safetensors")
        for place in (folder, folder / "checkpoints" / "step-00000044")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
