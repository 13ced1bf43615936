"""Callbacks: Ctrl-C within an epoch, and resources that a killed process had reserved."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from helpers.commands import read_metrics
from helpers.limits import file_size_limit
from helpers.local_ray import local_ray
from helpers.processes import children, wait_for
from helpers.small_search import (
    COMMAND,
    FRECHET,
    SPACE,
    leaderboard,
    prepared_search,
    run_search,
)
from helpers.terminal_process import TerminalProcess
from ray.util.placement_group import placement_group
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_ray.training.ray_compat import orphaned_placement_groups
from cl_ray.tuning.callbacks import (
    InterruptCallback,
    Interrupted,
    OrphanedPlacementGroups,
    StudyCallback,
)
from cl_ray.tuning.space import Space

pytestmark = pytest.mark.ray

STEPS = 100
"""Steps of an epoch of two pairs a step."""
SLOW_STEPS = "--set=optimizer.d_steps=16"
"""An epoch takes seconds, more than a search needs to hear of a Ctrl-C."""
Start = Callable[..., TerminalProcess]


@pytest.fixture
def start(flags: list[str], make_digits: Callable[[int], str], tmp_path: Path) -> Iterator[Start]:
    """Starts a search of one epoch over so many images."""
    started: list[TerminalProcess] = []

    def run(*more: str, images: int = 2 * STEPS, terminal: bool = False) -> TerminalProcess:
        command = [
            *COMMAND, f"--data={make_digits(images)}", *flags[1:], f"--storage={tmp_path}",
            "--name=s", "--epochs=1", "--metric=reconstruction", "--set=batch_size=2", *more,
        ]  # fmt: skip
        started.append(TerminalProcess(command, tmp_path / "log", terminal))
        return started[-1]

    yield run
    for search in started:
        search.process.kill()


def saved_steps(folder: Path, trial: int) -> int:
    """The step of a trial's newest checkpoint."""
    found = (folder / "trials" / f"{trial:04d}" / "checkpoints").glob("step-*/manifest.json")
    return max((int(file.parent.name.removeprefix("step-")) for file in found), default=0)


@pytest.mark.parametrize(("workers", "sent"), [(1, "Ctrl-C"), (2, "SIGTERM")])
def test_a_trial_resumes_from_its_last_checkpoint_within_the_epoch(
    start: Start, tmp_path: Path, workers: int, sent: str
) -> None:
    search = start(
        f"--workers={workers}", "--cpus-per-trial=1", "--trials=1", "--scheduler=none",
        "--set=log_every=1", "--set=checkpoint.every=4", SLOW_STEPS,
    )  # fmt: skip
    folder = tmp_path / "s"
    search.wait_for(lambda: saved_steps(folder, 0), "a checkpoint")
    if sent == "Ctrl-C":
        search.press_ctrl_c()
    else:
        search.process.terminate()  # as `ray job stop` does
    output = search.wait_interrupted()
    _, stopping, after = output.partition("Stopping: the running trials go back to their last")
    assert stopping
    assert "Traceback" not in output
    assert f"resume with: python tuning/search.py --resume s --storage {tmp_path}" in after
    assert "trial 0 epoch" not in output  # without waiting for the epoch's end
    saved = saved_steps(folder, 0)
    assert 0 < saved < STEPS
    resumed_at = time.time()
    done = run_search(f"--storage={tmp_path}", "--resume=s")
    assert done.returncode == 0, done.stdout + done.stderr
    trial = folder / "trials" / "0000"
    assert [line["step"] for line in read_metrics(trial)] == [STEPS]
    logged = EventAccumulator(str(trial / "tensorboard")).Reload()
    steps = logged.Scalars("speed/images_per_second")
    assert [event.step for event in steps if event.wall_time < resumed_at][-1] == saved
    assert leaderboard(folder)[0]["status"] == "finished"


def values_of(folder: Path) -> list[dict[str, Any]]:
    """What was computed in each epoch of each trial, without the times."""
    times = ("seconds", "images_per_second", "data_time_fraction", "evaluation/seconds")
    return [
        {name: value for name, value in line.items() if name not in times}
        for trial in sorted((folder / "trials").iterdir())
        for line in read_metrics(trial)
    ]


UNDISTURBED: list[dict[str, Any]] = []
"""What the search of the next test computes where nothing ends it."""


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "full_for"), [(1, "trial"), (2, "trial"), (1, "driver")])
def test_a_full_disk_ends_the_search_and_with_room_it_goes_on(
    start: Start, flags: list[str], tmp_path: Path, workers: int, full_for: str
) -> None:
    trials = 2 if workers == 1 else 1
    more = [
        f"--workers={workers}", f"--cpus-per-trial={workers}", f"--trials={trials}",
        "--concurrent=1", "--scheduler=none", "--epochs=2", "--sampler=random",
        "--set=batch_size=32",
    ]  # fmt: skip
    search = start(*more, images=400)
    folder = tmp_path / "s"
    search.wait_for(lambda: saved_steps(folder, 0), "a first checkpoint")
    title = "RayTrainWorker" if workers > 1 else "ray::Trial_s"
    found = [pid for pid, name in children(search.process.pid) if title in name]
    assert len(found) == workers
    pids, size = found, 5_000
    if full_for == "driver":
        pids, size = [search.process.pid], (folder / "study.log").stat().st_size + 200
    with contextlib.ExitStack() as limits:
        for pid in pids:
            limits.enter_context(file_size_limit(size, pid))
        status = search.process.wait(timeout=400)
    output = search.output()
    assert status == 1, output
    assert output.splitlines()[-1].startswith(f"python tuning/search.py: {folder}")
    assert "cannot be written (File too large): raise the limit" in output.splitlines()[-1]
    for unwanted in ("Traceback", "is tried once more", "failed", " is lost"):
        assert unwanted not in output
    assert not [path for path in folder.rglob("*") if path.name.startswith("tune-")]
    done = run_search(f"--storage={tmp_path}", "--resume=s")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["status"] for row in leaderboard(folder).values()} == {"finished"}
    if workers > 1:
        return  # that workers resume bit for bit is tested of runs, and takes another minute here
    if not UNDISTURBED:
        whole = start(*more, "--name=whole", images=400)
        assert whole.process.wait(timeout=400) == 0, whole.output()
        UNDISTURBED.extend(values_of(tmp_path / "whole"))
    assert values_of(folder) == UNDISTURBED


def test_a_search_ends_when_its_terminal_closes(start: Start, tmp_path: Path) -> None:
    search = start(
        "--trials=1", "--set=log_every=1", "--set=checkpoint.every=4", SLOW_STEPS, terminal=True
    )  # fmt: skip
    folder = tmp_path / "s"
    search.wait_for(lambda: saved_steps(folder, 0), "a checkpoint")
    search.close_terminal()
    search.wait_interrupted()
    assert 0 < saved_steps(folder, 0) < STEPS


def test_only_the_first_ctrl_c_waits_for_ray_tune() -> None:
    said: list[str] = []
    callback = InterruptCallback(said.append)
    with callback.catch_sigint():
        callback.on_step_begin(0, [])
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert not said
        with pytest.raises(Interrupted):
            callback.on_step_begin(1, [])
    assert len(said) == 1
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_before_a_trial_has_its_folder_is_told(tmp_path: Path) -> None:
    """As of values that a config refuses together; Ray Tune alone has its text."""
    callback = object.__new__(StudyCallback)
    callback.search = prepared_search(tmp_path, [FRECHET], Space.from_yaml(SPACE))
    (tmp_path / "error.txt").write_text(
        "Failure # 1 (occurred at 2026-11-30_10-00-00)\nray::Trial_s.__init__()\n"
        '  File "trial.py", line 1, in assign\ncl_ray.errors.UserError: hinge is refused.\n'
    )
    trial: Any = SimpleNamespace(
        error_file=str(tmp_path / "error.txt"), config={"point": {"number": 0}}
    )
    assert callback._failure_reason(trial) == "hinge is refused."


def test_only_what_dead_actors_reserved_is_released() -> None:
    with local_ray(cpus=4):

        class Creator:
            def reserve(self, lifetime: str | None = None) -> str:
                group = placement_group([{"CPU": 1}], lifetime=lifetime)
                assert group.wait(30)
                return str(group.id.hex())

        actor = ray.remote(num_cpus=0)(Creator)
        dead, alive = actor.remote(), actor.remote()
        kept = {
            placement_group([{"CPU": 1}]).id.hex(),
            ray.get(alive.reserve.remote()),
            ray.get(dead.reserve.remote("detached")),
        }
        lost = ray.get(dead.reserve.remote())
        assert orphaned_placement_groups() == []
        ray.kill(dead)
        wait_for(orphaned_placement_groups, "the end of its creator")
        assert [group.id.hex() for group in orphaned_placement_groups()] == [lost]
        OrphanedPlacementGroups().on_step_begin(0, [])
        wait_for(lambda: not orphaned_placement_groups(), "its removal")
        table = ray.util.placement_group_table()
        assert {key for key, group in table.items() if group["state"] != "REMOVED"} == kept
        wait_for(lambda: ray.available_resources().get("CPU") == 1, "its CPU")
