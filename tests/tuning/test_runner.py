"""Running trials: how many at once, schedulers, failures, and trials of several workers."""

import io
import os
import shlex
import signal
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import ray
from helpers.commands import read_metrics
from helpers.processes import children
from helpers.small_search import COMMAND, leaderboard, load_study, search_here
from helpers.terminal_process import TerminalProcess
from ray import cloudpickle
from ray.tune.schedulers import TrialScheduler

from cl_ray.data.dataset import UNLABELLED
from cl_ray.environment import usable_cpus
from cl_ray.errors import UserError
from cl_ray.training.resources import WorkerResources
from cl_ray.tuning.runner import (
    StudySearch,
    TrialResources,
    allocate_trials,
    build_scheduler,
    read_shared_rows,
)
from cl_ray.tuning.search import prepare_search
from cl_ray.tuning.study import TrialResult


def test_asha_compares_with_the_earlier_trials_of_a_resumed_search(
    flags: list[str], tmp_path: Path
) -> None:
    search = prepare_search([*flags, f"--storage={tmp_path}"], "search")

    def decision(earlier: list[TrialResult], value: float) -> str:
        asha = build_scheduler(search, earlier)
        trial = SimpleNamespace(trial_id="new", config={"point": {"number": 99}})
        asha.on_trial_add(None, trial)
        return str(asha.on_trial_result(None, trial, {"epoch": 1, "frechet": value}))

    earlier = [
        TrialResult(n, "stopped", {}, {"frechet": float(n)}, 1, history={1: float(n)})
        for n in range(1, 10)
    ]
    assert decision([], 8.0) == TrialScheduler.CONTINUE  # nothing to compare with
    assert decision(earlier, 8.0) == TrialScheduler.STOP
    assert decision(earlier, 1.5) == TrialScheduler.CONTINUE
    history = {1: 0.5, 2: 5.0}  # good after one epoch; the next result is of the third
    waiting = TrialResult(99, "waiting", {}, {"frechet": 5.0}, 2, history=history)
    asha = build_scheduler(search, [*earlier, waiting])
    trial = SimpleNamespace(trial_id="again", config={"point": {"number": 99}})
    asha.on_trial_add(None, trial)
    result = {"epoch": 2, "frechet": 8.0}  # the first of its rung, or else the worst after one
    assert asha.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE


def test_nothing_that_ray_tune_stores_holds_the_url_of_a_study(
    flags: list[str], tmp_path: Path
) -> None:
    """A password in it would be in the search's folder and in Ray's logs."""
    search = prepare_search(
        [*flags, f"--storage={tmp_path}", "--study=mssql+pyodbc://me:word@host/db"], "search"
    )
    study = optuna.create_study(storage=f"sqlite:///{tmp_path}/word.db")
    searcher = StudySearch(study, search, [3])
    assert b"word" in cloudpickle.dumps(study)
    stored = cloudpickle.dumps((search, searcher, build_scheduler(search, [])))
    assert b"word" not in stored
    again, resumed, _ = cloudpickle.loads(stored)
    assert again.options.study == "mssql+pyodbc://host/db"
    assert resumed.study is None
    assert search.options.study == "mssql+pyodbc://me:word@host/db"


Allocate = Callable[..., TrialResources]


@pytest.fixture
def allocate(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Allocate:
    """Divides a machine's CPUs and GPUs among four trials of a search with these flags."""
    monkeypatch.setattr("cl_ray.training.preflight.starts_local_ray", lambda address: False)
    for module in ("cl_ray.training.resources", "cl_ray.tuning.runner"):
        monkeypatch.setattr(f"{module}.find_autoscaler", lambda: None)

    def run(machine: tuple[int, int], *more: str, local: bool = True) -> TrialResources:
        nodes = [{"CPU": float(machine[0]), "GPU": float(machine[1])}]
        for module in ("cl_ray.training.resources", "cl_ray.tuning.runner"):
            monkeypatch.setattr(f"{module}.live_nodes", lambda: nodes)
        search = prepare_search([*flags, f"--storage={tmp_path}", "--trials=4", *more], "search")
        return allocate_trials(search, local)

    return run


@pytest.mark.parametrize(
    ("machine", "flags_given", "local", "expected"),
    [
        ((16, 1), "", True, (1, 1, 16, 1, 16)),
        ((16, 1), "--workers=2", True, (1, 2, 8, 0.5, 8)),
        ((16, 1), "--concurrent=4", True, (4, 1, 4, 0.25, 4)),
        ((16, 1), "--gpus-per-trial=0.5 --workers=2", True, (2, 2, 4, 0.25, 4)),
        ((16, 1), "--set=device=cpu --workers=2", True, (4, 2, 2, 0, 2)),
        ((16, 1), "--workers=2", False, (4, 2, 1, 0, 1)),
        ((2, 4), "", True, (2, 1, 1, 1, 1)),
        ((2, 4), "--cpus-per-trial=0.5", True, (4, 1, 0.5, 1, 1)),
        ((2, 4), "--gpus-per-trial=1", False, (2, 1, 1, 1, 1)),
        ((4, 0), "--workers=2 --cpus-per-trial=2", True, (2, 2, 1, 0, 1)),
        ((4, 0), "--workers=4 --cpus-per-trial=1.4", True, (2, 4, 0.35, 0, 1)),
    ],
)
def test_cpus_and_gpus_are_divided_among_trials_and_workers(
    allocate: Allocate,
    machine: tuple[int, int],
    flags_given: str,
    local: bool,
    expected: tuple[int, int, float, float, int],
) -> None:
    concurrent, workers, cpus, gpus, threads = expected
    each = WorkerResources(cpus, gpus, threads, None)
    found = allocate(machine, *flags_given.split(), local=local)
    assert found == TrialResources(concurrent, workers, each)


@pytest.mark.parametrize(
    ("machine", "flags_given", "message"),
    [
        (
            (16, 1),
            "--workers=2 --gpus-per-trial=1 --concurrent=3",
            "concurrent 3 with 2 workers of 0.5 GPU each need 3 GPU; the cluster has 1: take "
            "--concurrent 1, or a smaller --gpus-per-trial.",
        ),
        (  # a worker is never split over two GPUs
            (2, 4),
            "--cpus-per-trial=0.2 --gpus-per-trial=0.6 --concurrent=5",
            "concurrent 5 with 0.2 CPU and 0.6 GPU each do not fit: the cluster's nodes, 1 of "
            "them, have room for 4: take --concurrent 4, or give each less.",
        ),
        (
            (4, 0),
            "--workers=8",
            "concurrent 1 with 8 workers of 1 CPU each need 8 CPU; the cluster has 4: take "
            "--workers 4, or a smaller --cpus-per-trial.",
        ),
        (
            (4, 0),
            "--workers=8 --concurrent=2",
            "concurrent 2 with 8 workers of 1 CPU each need 16 CPU; the cluster has 4: take "
            "--concurrent 1 with --workers 4, or a smaller --cpus-per-trial.",
        ),
        (
            (4, 0),
            "--workers=4 --cpus-per-trial=8",
            "concurrent 1 with 4 workers of 2 CPU each need 8 CPU; the cluster has 4: take a "
            "smaller --cpus-per-trial.",
        ),
        (
            (4, 0),
            "--gpus-per-trial=1",
            "concurrent 1 with 1 GPU each need 1 GPU; the cluster has 0: take a smaller "
            "--gpus-per-trial.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_with_what_does(
    allocate: Allocate, machine: tuple[int, int], flags_given: str, message: str
) -> None:
    with pytest.raises(UserError) as caught:
        allocate(machine, *flags_given.split(), local=False)
    assert str(caught.value) == message


@pytest.mark.parametrize(("more", "local"), [("", False), (" --cpus-per-trial=1", True)])
def test_a_population_is_not_bounded(allocate: Allocate, more: str, local: bool) -> None:
    flags_given = f"--scheduler=pbt --trials=4 --concurrent=2{more}".split()
    with pytest.raises(UserError, match="concurrent 2 does not bound a population"):
        allocate((4, 0), *flags_given, local=local)
    assert allocate((4, 0), *flags_given[:2], local=local).concurrent > 1


@pytest.mark.ray
def test_trials_train_on_the_labels_that_are_used(flags: list[str], tmp_path: Path) -> None:
    few = ["--set=condition=classifier", "--set=labels.count=20"]
    search = prepare_search([*flags, *few, f"--storage={tmp_path}"], "search")
    rows = read_shared_rows(search)
    assert rows is not None
    assert rows.label is not None
    assert (rows.label != UNLABELLED).sum() == 20


def test_a_trial_that_cannot_be_set_up_fails_and_the_search_ends(
    flags: list[str], tmp_path: Path, two_cpus: None
) -> None:
    """Only the nodes of the cluster know that they have no such device."""
    printed, address = io.StringIO(), ray.get_runtime_context().gcs_address
    with pytest.raises(UserError) as failed:
        search_here(
            *flags, f"--storage={tmp_path}", "--name=f", "--trials=1", "--set=device=mps",
            f"--address={address}", printed=printed,
        )  # fmt: skip
    (row,) = leaderboard(tmp_path / "f").values()
    assert row["status"] == "failed"
    assert row["reason"].startswith("device 'mps' is not")
    assert str(failed.value) == (
        f"No trial has metrics that can be ranked: trial 0 failed: {row['reason']}"
    )
    assert f"trial 0 is tried once more: {row['reason']}\n" in printed.getvalue()


NAME = "поиск-数据-🦋"
"""Of a search, and of its folder, its study and the processes of its trials."""


@pytest.mark.ray
def test_a_search_of_two_workers_may_have_a_name_beyond_ascii(
    flags: list[str], tmp_path: Path, two_cpus: None
) -> None:
    printed = search_here(
        *flags, f"--storage={tmp_path}", f"--name={NAME}", "--trials=1", "--epochs=1",
        "--workers=2", "--cpus-per-trial=1",
    )  # fmt: skip
    assert f"--resume {shlex.quote(NAME)}" in printed
    search_here(f"--resume={NAME}", f"--storage={tmp_path}")
    (row,) = leaderboard(tmp_path / NAME).values()
    assert row["status"] == "finished"
    assert f"<h1>{NAME}</h1>" in (tmp_path / NAME / "report.html").read_text()


@pytest.mark.ray
def test_a_population_copies_weights_and_architecture(
    flags: list[str], tmp_path: Path, two_cpus: None
) -> None:
    """All trials are one population, also where they train one at a time."""
    search_here(
        *flags, f"--storage={tmp_path}", f"--name={NAME}", "--scheduler=pbt", "--trials=3",
        "--epochs=3", "--concurrent=1", "--metric=reconstruction",
    )  # fmt: skip
    rows = leaderboard(tmp_path / NAME)
    assert {number: row["status"] for number, row in rows.items()} == dict.fromkeys(
        range(3), "finished"
    )
    trials = load_study(tmp_path / NAME).trials
    starts = {trial.number: trial.user_attrs["values"] for trial in trials}
    depths = itemgetter("generator.depth", "discriminator.depth")
    changed = [number for number, row in rows.items() if row["values"] != starts[number]]
    assert changed
    for number in changed:
        donors = [depths(values) for other, values in starts.items() if other != number]
        assert depths(rows[number]["values"]) in donors


# The initial point goes first; nearly all others hardly move G, so that they are stopped.
SLOW_RATES = "optimizer.lr_g: {kind: log, low: 1.0e-9, high: 0.0036}\n"


@pytest.mark.slow
@pytest.mark.ray
def test_trials_of_two_workers_end_where_they_are_stopped_or_killed(
    flags: list[str], tmp_path: Path
) -> None:
    """Without the dashboard; a killed trial's workers hold the CPUs that its retry needs."""
    space = tmp_path / "space.yaml"
    space.write_text(SLOW_RATES)
    command = [
        *COMMAND, *flags[:2], f"--space={space}", f"--storage={tmp_path}", "--name=w",
        "--workers=2", f"--cpus-per-trial={usable_cpus()}", "--trials=2", "--epochs=2",
        "--metric=reconstruction", "--sampler=random", "--concurrent=1",
    ]  # fmt: skip
    search = TerminalProcess(command, tmp_path / "log")
    folder = tmp_path / "w"
    try:
        first = folder / "trials" / "0000" / "checkpoints"
        search.wait_for(lambda: list(first.glob("*/manifest.json")), "a first checkpoint")
        (victim,) = [p for p, title in children(search.process.pid) if "ray::Trial_w" in title]
        os.kill(victim, signal.SIGKILL)
        assert search.process.wait(timeout=500) == 0, search.output()
    finally:
        search.process.kill()
    output = search.output()
    assert output.count("is tried once more: process ") == 1
    assert "1 trial at a time, of 2 workers, " in output
    rows = leaderboard(folder)
    assert rows[0]["status"] == "finished"
    assert rows[0]["values"] == {"optimizer.lr_g": 0.003}
    assert {row["status"] for row in rows.values()} == {"finished", "stopped"}, output
    for number, row in rows.items():
        run = folder / "trials" / f"{number:04d}"
        assert len(read_metrics(run)) == row["epoch"]
        assert "\nworkers: 2\n" in (run / "config.yaml").read_text()
        assert row["metrics"]["reconstruction"] == row["history"][str(row["epoch"])]
