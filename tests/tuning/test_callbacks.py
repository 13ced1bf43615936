"""Callbacks: Ctrl-C within an epoch, and resources that a killed process had reserved."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.commands import read_metrics
from helpers.local_ray import local_ray
from helpers.small_search import COMMAND, leaderboard, run_search
from helpers.terminal_process import TerminalProcess
from ray.util.placement_group import placement_group
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_ray.training.ray_compat import orphaned_placement_groups
from cl_ray.tuning.callbacks import OrphanedPlacementGroups

pytestmark = pytest.mark.ray

STEPS = 350
"""Steps of an epoch."""
Start = Callable[..., TerminalProcess]


@pytest.fixture
def start(flags: list[str], make_digits: Callable[[int], str], tmp_path: Path) -> Iterator[Start]:
    """Starts a search whose epoch has so many steps of two pairs."""
    started: list[TerminalProcess] = []

    def run(*more: str) -> TerminalProcess:
        command = [
            *COMMAND, f"--data={make_digits(2 * STEPS)}", *flags[1:], f"--storage={tmp_path}",
            "--name=s", "--epochs=1", "--metric=reconstruction", "--set=batch_size=2", *more,
        ]  # fmt: skip
        started.append(TerminalProcess(command, tmp_path / "log"))
        return started[-1]

    yield run
    for search in started:
        search.process.kill()


def saved_steps(folder: Path, trial: int) -> int:
    """The step of a trial's newest checkpoint."""
    found = (folder / "trials" / f"{trial:04d}" / "checkpoints").glob("step-*/manifest.json")
    return max((int(file.parent.name.removeprefix("step-")) for file in found), default=0)


def trains(folder: Path, trial: int) -> bool:
    """Whether a trial has logged steps."""
    curves = folder / "trials" / f"{trial:04d}" / "tensorboard"
    if not curves.is_dir():
        return False
    events = EventAccumulator(str(curves))
    events.Reload()
    return "speed/images_per_second" in events.Tags()["scalars"]


@pytest.mark.parametrize(("workers", "sent"), [(1, "Ctrl-C"), (2, "SIGTERM")])
def test_trials_save_within_the_epoch_and_resume_there(
    start: Start, tmp_path: Path, workers: int, sent: str
) -> None:
    trials = 2 if workers == 1 else 1
    # The second trial starts seconds after the first, which must not have ended by then.
    d_steps = 16 if trials > 1 else 1
    search = start(
        f"--workers={workers}", "--cpus-per-trial=1", f"--trials={trials}", "--scheduler=none",
        f"--concurrent={trials}", f"--set=optimizer.d_steps={d_steps}", "--set=log_every=1",
        "--set=checkpoint.every=0",
    )  # fmt: skip
    folder = tmp_path / "s"
    search.wait_for(lambda: all(trains(folder, n) for n in range(trials)), "steps of each trial")
    if sent == "Ctrl-C":
        search.press_ctrl_c()
    else:
        search.process.terminate()  # as `ray job stop` does
    output = search.wait_interrupted()
    _, stopping, after = output.partition("Stopping: the running trials save where they are")
    assert stopping
    assert "Not saved within" not in after
    assert "Traceback" not in output
    assert f"resume with: python tuning/search.py --resume s --storage {tmp_path}" in after
    for trial in range(trials):  # without waiting for the epoch's end
        assert f"trial {trial} epoch" not in output
        assert 0 < saved_steps(folder, trial) < STEPS
    done = run_search(f"--storage={tmp_path}", "--resume=s")
    assert done.returncode == 0, done.stdout + done.stderr
    for trial in range(trials):
        lines = read_metrics(folder / "trials" / f"{trial:04d}")
        assert [line["step"] for line in lines] == [STEPS]
        assert leaderboard(folder)[trial]["status"] != "running"


def test_a_second_ctrl_c_ends_the_search_at_once(start: Start, tmp_path: Path) -> None:
    """The first one waits for the next logged step, which is 50 steps away."""
    search = start(
        "--trials=1", "--set=log_every=100000", "--set=optimizer.d_steps=16",
        "--set=checkpoint.every=50",
    )  # fmt: skip
    folder = tmp_path / "s"
    search.wait_for(lambda: saved_steps(folder, 0) == 50, "a checkpoint within the epoch")
    search.press_ctrl_c()
    search.wait_for(lambda: "Stopping: " in search.output(), "the answer to the first")
    search.press_ctrl_c()
    output = search.wait_interrupted()
    assert "resume with: python tuning/search.py --resume s" in output
    assert "Traceback" not in output
    assert saved_steps(folder, 0) == 50


def test_only_what_dead_actors_reserved_is_released() -> None:
    def wait_for(condition: Callable[[], Any]) -> None:
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.1)

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
        wait_for(orphaned_placement_groups)
        assert [group.id.hex() for group in orphaned_placement_groups()] == [lost]
        OrphanedPlacementGroups().on_step_begin(0, [])
        wait_for(lambda: not orphaned_placement_groups())
        table = ray.util.placement_group_table()
        assert {key for key, group in table.items() if group["state"] != "REMOVED"} == kept
        wait_for(lambda: ray.available_resources().get("CPU") == 1)
