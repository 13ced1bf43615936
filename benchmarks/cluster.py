"""Run the shipped aws.yaml on the fake cloud again and again: up, train on two machines, down.

    python benchmarks/cluster.py 10        # as root

Runs that part of tests/cluster/test_aws.py so many times. Prints how often it passed, how many
epochs were lost with the machine that is killed during training, and the seconds until training
resumed. `--all` runs the whole file each time.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
STORY = "test_up or test_training or test_down"


def run_once(select: str, metrics_file: Path) -> tuple[bool, float, dict[str, float]]:
    """Run the tests once; returns whether they passed, their seconds and their metrics."""
    metrics_file.write_text("")
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-k", select, "tests/cluster/test_aws.py"],
        cwd=ROOT,
        env={**os.environ, "CL_RAY_CLUSTER_METRICS": str(metrics_file)},
        stdout=subprocess.PIPE,
        text=True,
    )
    passed = done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout
    if not passed:
        print(done.stdout[-3000:], file=sys.stderr)
    metrics: dict[str, float] = {}
    for line in metrics_file.read_text().splitlines():
        metrics.update(json.loads(line))
    return passed, time.monotonic() - began, metrics


def main(rounds: Annotated[int, tyro.conf.Positional] = 10, all: bool = False) -> None:
    """Print the table; with `all`, run the whole file each time."""
    table = Table("round", "passed", "seconds in all", "epochs lost", "seconds to recovery")
    passes, lost, recovered = 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds):
            select = "test" if all else STORY
            passed, seconds, metrics = run_once(select, Path(folder) / "metrics.jsonl")
            passes += passed
            row = [str(number + 1), "yes" if passed else "NO", f"{seconds:.0f}"]
            if "seconds_to_recovery" in metrics:
                lost.append(metrics["epochs_lost"])
                recovered.append(metrics["seconds_to_recovery"])
                row += [f"{lost[-1]:.2f}", f"{recovered[-1]:.0f}"]
            table.add_row(*row)
            print(*row, flush=True)
    worst = [f"{max(lost):.2f}", f"{max(recovered):.0f}"] if lost else ["", ""]
    table.add_section()
    table.add_row("worst", f"{passes} of {rounds}", "", *worst)
    Console().print(table)


if __name__ == "__main__":
    tyro.cli(main)
