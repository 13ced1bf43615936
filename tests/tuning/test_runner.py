"""Running trials: how many at once, schedulers, failures, and trials of several workers."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
from helpers.local_ray import local_ray
from helpers.processes import children
from helpers.small_search import COMMAND, leaderboard, run_search
from helpers.terminal_process import TerminalProcess
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from ray.tune.schedulers import TrialScheduler

from cl_ray.errors import UserError
from cl_ray.training.resources import WorkerResources
from cl_ray.tuning.runner import TrialResources, allocate_trials, build_scheduler
from cl_ray.tuning.search import prepare_search
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, TrialResult

FRECHET = SearchMetric("frechet", maximize=False)


def test_asha_compares_with_the_earlier_trials_of_a_resumed_search() -> None:
    space = Space.load("rates")

    def decision(earlier: list[TrialResult], value: float) -> str:
        asha = build_scheduler("asha", FRECHET, 3, space, 0, earlier)
        trial = SimpleNamespace(trial_id="new")
        asha.on_trial_add(None, trial)
        return str(asha.on_trial_result(None, trial, {"epoch": 1, "frechet": value}))

    earlier = [
        TrialResult(n, "stopped", {}, {"frechet": float(n)}, 1, history={1: float(n)})
        for n in range(1, 10)
    ]
    assert decision([], 8.0) == TrialScheduler.CONTINUE  # nothing to compare with
    assert decision(earlier, 8.0) == TrialScheduler.STOP
    assert decision(earlier, 1.5) == TrialScheduler.CONTINUE


Allocate = Callable[..., TrialResources]


@pytest.fixture
def allocate(flags: list[str], tmp_path: Path) -> Allocate:
    """Divides Ray's CPUs and GPUs among four trials of a search with these flags."""

    def run(*more: str, local: bool = True) -> TrialResources:
        search = prepare_search([*flags, f"--storage={tmp_path}", "--trials=4", *more], "search")
        return allocate_trials(search, local)

    return run


def refusal(allocate: Allocate, *more: str, local: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        allocate(*more, local=local)
    return str(caught.value)


def resources(
    concurrent: int, workers: int, cpus: float, gpus: float, threads: int
) -> TrialResources:
    return TrialResources(concurrent, workers, WorkerResources(cpus, gpus, threads, None))


@pytest.mark.ray
def test_one_gpu_is_divided_among_trials_and_workers(allocate: Allocate) -> None:
    with local_ray(cpus=16, gpus=1):
        assert allocate() == resources(1, 1, 16, 1, 16)
        assert allocate("--workers=2") == resources(1, 2, 8, 0.5, 8)
        assert allocate("--concurrent=4") == resources(4, 1, 4, 0.25, 4)
        assert allocate("--gpus-per-trial=0.25") == resources(4, 1, 4, 0.25, 4)
        half = ("--gpus-per-trial=0.5", "--workers=2")
        assert allocate(*half) == resources(2, 2, 4, 0.25, 4)
        assert allocate("--set=device=cpu", "--workers=2") == resources(4, 2, 2, 0, 2)
        assert allocate("--workers=2", local=False) == resources(4, 2, 1, 0, 1)
        flags = ("--workers=2", "--gpus-per-trial=1", "--concurrent=3")
        assert refusal(allocate, *flags) == (
            "concurrent 3 with 2 workers of 0.5 GPU each need 3 GPU; the cluster has 1: take "
            "--concurrent 1, or a smaller --gpus-per-trial."
        )


@pytest.mark.ray
def test_neither_cpus_nor_gpus_are_given_twice(allocate: Allocate) -> None:
    with local_ray(cpus=2, gpus=4):
        assert allocate() == resources(2, 1, 1, 1, 1)
        assert allocate("--workers=2") == resources(1, 2, 1, 1, 1)
        assert allocate("--cpus-per-trial=0.5") == resources(4, 1, 0.5, 1, 1)
        assert allocate("--gpus-per-trial=2", local=False) == resources(2, 1, 1, 2, 1)
        assert allocate("--gpus-per-trial=4", local=False) == resources(1, 1, 1, 4, 1)
        # A worker is never split over two GPUs.
        part = ("--cpus-per-trial=0.2", "--gpus-per-trial=0.6", "--concurrent=5")
        assert refusal(allocate, *part) == (
            "concurrent 5 with 0.2 CPU and 0.6 GPU each do not fit: the cluster's nodes, 1 of "
            "them, have room for 4: take --concurrent 4, or give each less."
        )
        one = ("--workers=5", "--cpus-per-trial=1", "--gpus-per-trial=3", "--set=batch_size=40")
        assert refusal(allocate, *one) == (
            "concurrent 1 with 5 workers of 0.2 CPU and 0.6 GPU each do not fit: the cluster's "
            "nodes, 1 of them, have room for 4: give each less."
        )


@pytest.mark.ray
def test_a_trial_s_cpus_are_divided_among_its_workers(allocate: Allocate) -> None:
    with local_ray(cpus=4, gpus=0):
        assert allocate("--workers=2", "--cpus-per-trial=4") == resources(1, 2, 2, 0, 2)
        assert allocate("--workers=2", "--cpus-per-trial=2") == resources(2, 2, 1, 0, 1)
        assert allocate("--workers=4", "--cpus-per-trial=1.4") == resources(2, 4, 0.35, 0, 1)
        assert allocate("--workers=4") == resources(1, 4, 1, 0, 1)
        # What a refusal proposes fits.
        assert refusal(allocate, "--workers=8") == (
            "concurrent 1 with 8 workers of 1 CPU each need 8 CPU; the cluster has 4: take "
            "--workers 4, or a smaller --cpus-per-trial."
        )
        assert refusal(allocate, "--workers=8", "--concurrent=2") == (
            "concurrent 2 with 8 workers of 1 CPU each need 16 CPU; the cluster has 4: take "
            "--concurrent 1 with --workers 4, or a smaller --cpus-per-trial."
        )
        assert refusal(allocate, "--workers=4", "--cpus-per-trial=8") == (
            "concurrent 1 with 4 workers of 2 CPU each need 8 CPU; the cluster has 4: take a "
            "smaller --cpus-per-trial."
        )
        assert refusal(allocate, "--concurrent=4", "--cpus-per-trial=2") == (
            "concurrent 4 with 2 CPU each need 8 CPU; the cluster has 4: take --concurrent 2, or "
            "a smaller --cpus-per-trial."
        )
        for local in (True, False):  # where the cluster has no GPU
            assert refusal(allocate, "--gpus-per-trial=1", local=local) == (
                "concurrent 1 with 1 GPU each need 1 GPU; the cluster has 0: take a smaller "
                "--gpus-per-trial."
            )


@pytest.mark.ray
def test_a_trial_that_cannot_be_set_up_fails_and_the_search_ends(
    flags: list[str], tmp_path: Path
) -> None:
    """Only the nodes of the cluster know that they have no such device."""
    with local_ray(cpus=1) as context:
        done = run_search(
            *flags, f"--storage={tmp_path}", "--name=f", "--trials=1", "--set=device=mps",
            f"--address={context.address_info['address']}",
        )  # fmt: skip
    assert done.returncode == 1, done.stdout + done.stderr
    (row,) = leaderboard(tmp_path / "f").values()
    assert row["status"] == "failed"
    assert row["reason"].startswith("device 'mps' is not")
    assert done.stderr == (
        "python tuning/search.py: No trial has metrics that can be ranked: trial 0 failed: "
        f"{row['reason']}\n"
    )
    assert f"trial 0 is tried once more: {row['reason']}\n" in done.stdout


@pytest.mark.ray
def test_a_population_copies_weights_and_architecture(flags: list[str], tmp_path: Path) -> None:
    done = run_search(
        *flags, f"--storage={tmp_path}", "--name=p", "--scheduler=pbt", "--population=4",
        "--epochs=4", "--concurrent=2", "--metric=reconstruction",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = leaderboard(tmp_path / "p")
    assert {row["status"] for row in rows.values()} == {"finished"}
    assert sorted(rows) == [0, 1, 2, 3]
    study = optuna.load_study(
        study_name="p", storage=JournalStorage(JournalFileBackend(str(tmp_path / "p/study.log")))
    )
    depths = ("generator.depth", "discriminator.depth")
    changed = 0
    for trial in study.trials:
        start, end = trial.user_attrs["values"], rows[trial.number]["values"]
        if start != end:
            changed += 1
            donors = [t.user_attrs["values"] for t in study.trials if t.number != trial.number]
            assert any(all(donor[d] == end[d] for d in depths) for donor in donors)
    assert changed


# The initial point goes first; nearly all others hardly move G, so that they are stopped.
SLOW_RATES = "optimizer.lr_g: {kind: log, low: 1.0e-9, high: 0.0012}\n"


@pytest.mark.ray
def test_trials_of_two_workers_end_where_they_are_stopped_or_killed(
    flags: list[str], tmp_path: Path
) -> None:
    """Without the dashboard; a killed trial's workers hold the CPUs that its retry needs."""
    space = tmp_path / "space.yaml"
    space.write_text(SLOW_RATES)
    command = [
        *COMMAND, *flags[:2], f"--space={space}", f"--storage={tmp_path}", "--name=w",
        "--workers=2", f"--cpus-per-trial={os.cpu_count()}", "--trials=3", "--epochs=2",
        "--metric=reconstruction", "--sampler=random", "--concurrent=1",
    ]  # fmt: skip
    search = TerminalProcess(command, tmp_path / "log")
    folder = tmp_path / "w"
    try:
        first = folder / "trials" / "0000" / "checkpoints"
        search.wait_for(lambda: list(first.glob("*/manifest.json")), "a first checkpoint")
        (victim,) = [p for p, title in children(search.process.pid) if "ray::Trial_w" in title]
        os.kill(victim, signal.SIGKILL)
        assert search.process.wait(timeout=300) == 0, search.output()
    finally:
        search.process.kill()
    output = search.output()
    assert output.count("is tried once more: process ") == 1
    assert "1 trial at a time, of 2 workers, " in output
    rows = leaderboard(folder)
    assert rows[0]["status"] == "finished"
    assert rows[0]["values"] == {"optimizer.lr_g": 0.001}
    assert {row["status"] for row in rows.values()} == {"finished", "stopped"}, output
    for number, row in rows.items():
        run = folder / "trials" / f"{number:04d}"
        assert len((run / "metrics.jsonl").read_text().splitlines()) == row["epoch"]
        assert "\nworkers: 2\n" in (run / "config.yaml").read_text()
        assert row["metrics"]["reconstruction"] == row["history"][str(row["epoch"])]
