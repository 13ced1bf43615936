"""The shipped aws.yaml on the fake cloud again and again: up, training on two machines, down.

`python benchmarks/cluster.py 10` runs that part of tests/cluster/test_aws.py so many times, as
root, and prints how often it passed, the epochs lost with the machine whose plug is pulled in
mid-training, and the seconds until steps go on. `--all` runs the whole file each time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).parent.parent
STORY = "test_up or test_training or test_down"


def once(select: str, metrics: Path) -> tuple[bool, float, dict[str, float]]:
    """Whether a round passed, its seconds, and what it noted."""
    metrics.write_text("")
    begun = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-k", select, "tests/cluster/test_aws.py"],
        cwd=ROOT,
        env={**os.environ, "CL_RAY_CLUSTER_FIGURES": str(metrics)},
        stdout=subprocess.PIPE,
        text=True,
    )
    passed = done.returncode == 0 and " passed" in done.stdout and "skipped" not in done.stdout
    if not passed:
        print(done.stdout[-3000:], file=sys.stderr)
    noted: dict[str, float] = {}
    for line in metrics.read_text().splitlines():
        noted.update(json.loads(line))
    return passed, time.monotonic() - begun, noted


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("rounds", type=int, nargs="?", default=10)
    parser.add_argument("--all", action="store_true", help="the whole story each time")
    asked = parser.parse_args()
    table = Table("round", "passed", "seconds in all", "epochs lost", "seconds to recovery")
    passes, lost, recovered = 0, [], []
    with tempfile.TemporaryDirectory() as folder:
        for number in range(asked.rounds):
            select = "test" if asked.all else STORY
            passed, seconds, noted = once(select, Path(folder) / "metrics.jsonl")
            passes += passed
            row = [str(number + 1), "yes" if passed else "NO", f"{seconds:.0f}"]
            if "seconds_to_recovery" in noted:
                lost.append(noted["epochs_lost"])
                recovered.append(noted["seconds_to_recovery"])
                row += [f"{lost[-1]:.2f}", f"{recovered[-1]:.0f}"]
            table.add_row(*row)
            print(*row, flush=True)
    table.add_section()
    worst = [f"{max(lost):.2f}", f"{max(recovered):.0f}"] if lost else ["", ""]
    table.add_row("worst", f"{passes} of {asked.rounds}", "", *worst)
    Console().print(table)


if __name__ == "__main__":
    main()
