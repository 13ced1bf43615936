"""Waiting: seconds until commands answer.

`python benchmarks/start.py` prints the seconds and the CPU seconds until each command ends with
`--help` and with a wrong flag, and those from `cl-ray train` to its first step, by turns with Ray
and torch alone, with the ratio of each round.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

from cl_ray.cli import COMMANDS

ROUNDS = 3
ALONE = "import torch, ray; ray.init(address='local')"


def first_step(storage: str, number: int) -> float:
    """Return the seconds until the command prints its first step, and interrupt it."""
    train = [sys.executable, "-m", "cl_ray", "train", "--preset=quick", "--log-every=1"]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*train, f"--storage={storage}", f"--name=start{number}"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    for line in process.stdout:
        if line.startswith("epoch 1/"):
            break
    seconds = time.perf_counter() - begun
    process.send_signal(2)
    process.wait()
    return seconds


def alone() -> float:
    """Return the seconds of `python -c "import torch, ray; ray.init()"`."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", ALONE], check=True, stderr=subprocess.DEVNULL)
    return time.perf_counter() - begun


def measure_end(*arguments: str) -> str:
    """Return the seconds and the CPU seconds until a command ends."""
    begun, before = time.perf_counter(), os.times()
    command = [sys.executable, "-m", "cl_ray", *arguments]
    subprocess.run(command, check=False, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])  # of children that have ended
    return f"{time.perf_counter() - begun:.2f} ({cpu:.2f})"


def main() -> None:
    answers = Table("command", "--help", "a wrong flag", title="seconds (CPU seconds)")
    for name in COMMANDS:
        answers.add_row(name, measure_end(name, "--help"), measure_end(name, "--wrong=1"))
    Console().print(answers)
    table = Table("round", "torch and Ray alone", "cl-ray train, first step", "ratio")
    ratios = []
    with tempfile.TemporaryDirectory() as storage:
        for number in range(ROUNDS):
            theirs, ours = alone(), first_step(storage, number)
            ratios.append(ours / theirs)
            table.add_row(str(number + 1), f"{theirs:.1f}", f"{ours:.1f}", f"{ratios[-1]:.2f}")
    table.add_row("median", "", "", f"[bold]{statistics.median(ratios):.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
