"""Ctrl-C as a terminal sends it, to a search whose trials are in the midst of an epoch."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers.running import Running
from helpers.search_command import COMMAND, search, table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

EPOCH = 350
"""Steps of an epoch."""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    begun: list[Running] = []

    def run(*flags: str) -> Running:
        command = [*COMMAND, f"--storage={tmp_path}", "--name=s", *flags]
        begun.append(Running(command, tmp_path / "log"))
        return begun[-1]

    yield run
    for running in begun:
        running.process.kill()


def steps(folder: Path, trial: int) -> int:
    """Steps after which its newest checkpoint was written."""
    found = (folder / "trials" / f"{trial:04d}" / "checkpoints").glob("step-*/manifest.json")
    return max((int(file.parent.name.removeprefix("step-")) for file in found), default=0)


def under_way(folder: Path, trial: int) -> bool:
    """Whether its curves have begun."""
    curves = folder / "trials" / f"{trial:04d}" / "tensorboard"
    if not curves.is_dir():
        return False
    events = EventAccumulator(str(curves))
    events.Reload()
    return "speed/waited" in events.Tags()["scalars"]


@pytest.mark.parametrize(("workers", "sent"), [(1, "Ctrl-C"), (2, "SIGTERM")])
def test_trials_save_within_the_epoch_and_go_on_from_there(
    flags: list[str],
    start: Callable[..., Running],
    make_digits: Callable[[int], str],
    tmp_path: Path,
    workers: int,
    sent: str,
) -> None:
    trials = 2 if workers == 1 else 1
    wide = [f"--workers={workers}", "--cpus-per-trial=1"]
    # The second trial begins seconds after the first, which must not be over by then.
    slow = f"--set=optimizer.d_steps={16 if trials > 1 else 1}"
    running = start(
        f"--data={make_digits(2 * EPOCH)}", *flags[1:], *wide, f"--trials={trials}",
        f"--concurrent={trials}", "--epochs=1", "--scheduler=none", "--metric=reconstruction",
        "--set=batch_size=2", slow, "--set=log_every=1", "--set=checkpoint.every=0",
    )  # fmt: skip
    every = range(trials)
    running.wait_for(
        lambda: all(under_way(tmp_path / "s", trial) for trial in every), "steps of each trial"
    )
    if sent == "Ctrl-C":
        running.press_ctrl_c()
    else:
        running.process.terminate()  # as `ray job stop` does
    said = running.end()
    _, _, after = said.partition("Stopping: the trials under way save where they are")
    assert after
    assert "Not saved within" not in after
    assert "Traceback" not in said
    assert f"go on with: python tuning/search.py --resume s --storage {tmp_path}" in after
    # No epoch was waited for, at whose end alone a checkpoint is due.
    for trial in every:
        assert f"trial {trial} epoch" not in said
        assert 0 < steps(tmp_path / "s", trial) < EPOCH
    done = search(f"--storage={tmp_path}", "--resume=s")
    assert done.returncode == 0, done.stdout + done.stderr
    for trial in every:
        text = (tmp_path / "s" / "trials" / f"{trial:04d}" / "metrics.jsonl").read_text()
        assert [json.loads(line)["step"] for line in text.splitlines()] == [EPOCH]
        assert table(tmp_path / "s")[trial]["status"] != "running"


def test_a_second_ctrl_c_ends_it_at_once(
    flags: list[str],
    start: Callable[..., Running],
    make_digits: Callable[[int], str],
    tmp_path: Path,
) -> None:
    """The first waits for a record, 50 steps away; what it would have saved then is not there."""
    running = start(
        f"--data={make_digits(2 * EPOCH)}", *flags[1:], "--trials=1", "--epochs=1",
        "--metric=reconstruction", "--set=batch_size=2", "--set=log_every=100000",
        "--set=optimizer.d_steps=16", "--set=checkpoint.every=50",
    )  # fmt: skip
    running.wait_for(lambda: steps(tmp_path / "s", 0) == 50, "a checkpoint in mid-epoch")
    running.press_ctrl_c()
    running.wait_for(lambda: "Stopping: " in running.said(), "the first one's answer")
    running.press_ctrl_c()
    said = running.end()
    assert "go on with: python tuning/search.py --resume s" in said
    assert "Traceback" not in said
    assert steps(tmp_path / "s", 0) == 50
