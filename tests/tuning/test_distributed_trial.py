"""Trials of two workers each: a TorchTrainer in every trial, stopped early, with no dashboard."""

import os
import signal
from pathlib import Path

from helpers.processes import children
from helpers.running import Running
from helpers.search_command import COMMAND, table

# The known setting goes first; nearly all others hardly move G, so that they are stopped.
SPACE = "optimizer.lr_g: {kind: log, low: 1.0e-9, high: 0.0012}\n"


def test_trainers_that_are_stopped_early_or_killed_come_to_their_end(
    flags: list[str], tmp_path: Path
) -> None:
    """A killed trial's workers held their CPUs, which its second attempt needs."""
    space = tmp_path / "space.yaml"
    space.write_text(SPACE)
    command = [
        *COMMAND, *flags[:2], f"--space={space}", f"--storage={tmp_path}", "--name=w",
        "--workers=2", f"--cpus-per-trial={os.cpu_count()}", "--trials=3", "--epochs=2",
        "--metric=reconstruction", "--sampler=random", "--concurrent=1",
    ]  # fmt: skip
    running = Running(command, tmp_path / "log")
    try:
        first = tmp_path / "w" / "trials" / "0000" / "checkpoints"
        running.wait_for(lambda: list(first.glob("*/manifest.json")), "a first checkpoint")
        victims = [p for p, title in children(running.process.pid) if "ray::Trial_w" in title]
        (victim,) = victims  # with several at once one might be on its way to its next trial
        os.kill(victim, signal.SIGKILL)
        assert running.process.wait(timeout=300) == 0, running.said()
    finally:
        running.process.kill()
    said = running.said()
    assert said.count("is tried once more: process ") == 1
    assert "1 trial at a time, of 2 workers, " in said
    rows = table(tmp_path / "w")
    assert rows[0]["status"] == "finished"
    assert rows[0]["values"] == {"optimizer.lr_g": 0.001}
    assert {row["status"] for row in rows.values()} == {"finished", "stopped"}, said
    for number, row in rows.items():
        folder = tmp_path / "w" / "trials" / f"{number:04d}"
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == row["epoch"]
        assert "\nworkers: 2\n" in (folder / "config.yaml").read_text()
        assert row["metrics"]["reconstruction"] == row["history"][str(row["epoch"])]
