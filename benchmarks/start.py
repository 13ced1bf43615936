"""Waiting: seconds until commands answer.

`python benchmarks/start.py` prints the seconds and the CPU seconds until each command ends with
`--help` and with a wrong flag, and those from `cl-ray train` to its first step, by turns with Ray
and torch alone, with the ratio of each round.
"""

import os
import subprocess
import sys
import tempfile
import time

from bare import CL_RAY, print_rounds
from rich.console import Console
from rich.table import Table

from cl_ray.cli import COMMANDS

ROUNDS = 3
ALONE = "import torch, ray; ray.init(address='local')"


def first_step(storage: str, number: int) -> float:
    """Return the seconds until the command prints its first step, and interrupt it."""
    train = [*CL_RAY, "train", "--preset=quick", "--log-every=1"]
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
    subprocess.run([*CL_RAY, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    after = os.times()
    cpu = sum(after[2:4]) - sum(before[2:4])  # of children that have ended
    return f"{time.perf_counter() - begun:.2f} ({cpu:.2f})"


def main() -> None:
    answers = Table("command", "--help", "a wrong flag", title="seconds (CPU seconds)")
    for name in COMMANDS:
        answers.add_row(name, measure_end(name, "--help"), measure_end(name, "--wrong=1"))
    Console().print(answers)
    with tempfile.TemporaryDirectory() as storage:
        seconds = [(alone(), first_step(storage, number)) for number in range(ROUNDS)]
    columns = {"torch and Ray alone": "{:.1f}", "first step": "{:.1f}", "ratio": "{:.2f}"}
    print_rounds("seconds", columns, [(a, b, b / a) for a, b in seconds])


if __name__ == "__main__":
    main()
