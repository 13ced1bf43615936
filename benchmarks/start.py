"""Start-up time: seconds from `cl-ray train` to its first step, against Ray and torch alone.

`python benchmarks/start.py` takes the two in turn and prints the ratio of each round.
"""

import statistics
import subprocess
import sys
import tempfile
import time

from rich.console import Console
from rich.table import Table

ROUNDS = 3
ALONE = "import torch, ray; ray.init(address='local')"


def first_step(storage: str, number: int) -> float:
    """Return the seconds until the command prints its first step, and interrupt it."""
    train = [sys.executable, "-m", "cl_ray", "train", "--preset=quick", "--log-every=1"]
    begun = time.perf_counter()
    process = subprocess.Popen(
        [*train, f"--storage={storage}", f"--name=start{number}"],
        stdout=subprocess.PIPE,
        text=True,
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


def main() -> None:
    """Print the table."""
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
