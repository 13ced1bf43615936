"""Population-based training against as many fixed settings of the same budget.

`python benchmarks/population.py` runs, seed by seed, `--scheduler pbt --population 4` and the same
four settings (the two that a search tries first and two drawn at random) trained to their end as
they are, each for 8 passes over 1,024 digits, two at once, and prints the best figure of each.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

SEARCH = [sys.executable, str(Path(__file__).parent.parent / "tuning" / "search.py")]
SEEDS, POPULATION = 3, 4
FLAGS = [
    *("--sampler=random", "--epochs=8", "--images=1024", "--concurrent=2", "--metric=frechet"),
    *("--set=evaluation.samples=1000", "--set=evaluation.images=500"),
]
WAYS = {
    "population": ["--scheduler=pbt", f"--population={POPULATION}"],
    "fixed": ["--scheduler=none", f"--trials={POPULATION}"],
}


def best(folder: Path, way: str, seed: int) -> tuple[float, int]:
    """The best last figure of a search's trials, and the passes that they were trained for."""
    name = f"{way}-{seed}"
    flags = [f"--storage={folder}", f"--name={name}", f"--seed={seed}", f"--set=seed={seed}"]
    done = subprocess.run([*SEARCH, *flags, *WAYS[way], *FLAGS], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
    rows = json.loads((folder / name / "leaderboard.json").read_text())
    finished = [row["metrics"]["frechet"] for row in rows if row["status"] == "finished"]
    return min(finished), sum(row["epoch"] for row in rows)


def main() -> None:
    """Print the table."""
    table = Table("seed", "population", "fixed", "ratio", "passes of each")
    ratios = []
    with tempfile.TemporaryDirectory() as storage:
        for seed in range(SEEDS):
            (ours, passes), (theirs, others) = (best(Path(storage), way, seed) for way in WAYS)
            ratios.append(ours / theirs)
            row = [str(seed), f"{ours:.2f}", f"{theirs:.2f}", f"{ratios[-1]:.2f}"]
            table.add_row(*row, f"{passes}, {others}")
            print(*row, passes, others, flush=True)
    table.add_row("median", "", "", f"[bold]{statistics.median(ratios):.2f}")
    table.caption = "Fréchet distance of 500 samples after the last pass: smaller is better"
    Console().print(table)


if __name__ == "__main__":
    main()
