"""What a search costs beyond its trainings: the same trials by Ray Tune and in one bare process.

`python benchmarks/tuning.py` runs a random search of 16 short trials, one at a time on one thread,
without stopping, then trains and measures the same settings one after another in this process, on
one thread too, and prints both totals, their ratio (Ray's start left out and shown apart) and the
cost of a trial.
"""

import contextlib
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from bare import passes
from rich.console import Console

from cl_ray.config import Config, merge
from cl_ray.data.dataset import Dataset
from cl_ray.device import keep_freed_memory
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.trainer import NonFiniteLossError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
TRIALS, EPOCHS, IMAGES = 16, 2, 1024
FIELDS = {"evaluation": {"reference": "mnist", "samples": 200, "images": 200}}


def searched(folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the search, and its leaderboard."""
    (folder / "config.yaml").write_text(yaml.safe_dump(FIELDS))
    flags = [
        *("--name=s", f"--storage={folder}", f"--config={folder / 'config.yaml'}"),
        *(f"--trials={TRIALS}", f"--epochs={EPOCHS}", f"--images={IMAGES}", "--concurrent=1"),
        *("--sampler=random", "--scheduler=none", "--cpus-per-trial=1"),
    ]
    begun = time.perf_counter()
    subprocess.run([sys.executable, ROOT / "tuning" / "search.py", *flags], check=True)
    seconds = time.perf_counter() - begun
    return seconds, json.loads((folder / "s" / "leaderboard.json").read_text())


def bare(rows: list[dict[str, Any]]) -> float:
    """Seconds of the same trainings and measurements with nothing around them."""
    from cl_ray.tuning.prepare import subset
    from cl_ray.tuning.space import nested

    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = subset(Dataset.open("mnist"), IMAGES)
    base = merge(Config().model_dump(), {**FIELDS, "epochs": EPOCHS})
    begun = time.perf_counter()
    evaluator = Evaluator(dataset, Config.model_validate(base).evaluation)
    for row in rows:
        config = Config.model_validate(merge(base, nested(row["values"])))
        with contextlib.suppress(NonFiniteLossError):
            for _, run in zip(range(row["epoch"]), passes(config, dataset), strict=False):
                evaluator.evaluate(run)
    return time.perf_counter() - begun


def main() -> None:
    """Print the metrics."""
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds, rows = searched(folder)
        # The trials alone: from the first's folder to the last word in the study.
        trials = folder / "s" / "trials"
        first = min((p / "config.yaml").stat().st_mtime for p in trials.iterdir())
        alone = (folder / "s" / "study.log").stat().st_mtime - first
        plain = bare(rows)
    console.print(f"search {seconds:.1f} s, of which its trials {alone:.1f} s; bare {plain:.1f} s")
    console.print(
        f"ratio of the trials {alone / plain:.2f}, with Ray's start {seconds / plain:.2f}"
    )
    console.print(f"beyond its training, a trial costs {(alone - plain) / TRIALS:.2f} s")


if __name__ == "__main__":
    main()
