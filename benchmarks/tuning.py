"""The overhead of a search: the same trials by Ray Tune, and in a loop in one process.

`python benchmarks/tuning.py` runs a random search of 16 short trials, one at a time on one thread,
without early stopping. It then trains and evaluates the same settings one after another in this
process, on one thread too, and prints both times, their ratio (with and without Ray's start) and
the overhead of a trial.
"""

import json
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from bare import CL_RAY, build_trainer
from rich.console import Console

from cl_ray.config import Config, merge
from cl_ray.data.dataset import Dataset
from cl_ray.device import keep_freed_memory
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.model import TrainedModel
from cl_ray.step_log import NonFiniteLossError
from cl_ray.tuning.search import subset_dataset
from cl_ray.tuning.space import unflatten

TRIALS, EPOCHS, IMAGES = 16, 2, 1024
FIELDS = {"evaluation": {"reference": "mnist", "samples": 200, "images": 200}}


def run_search(folder: Path) -> tuple[float, list[dict[str, Any]]]:
    """Return the seconds of the search, and its leaderboard."""
    (folder / "config.yaml").write_text(yaml.safe_dump(FIELDS))
    flags = [
        *("--name=s", f"--storage={folder}", f"--config={folder / 'config.yaml'}"),
        *(f"--trials={TRIALS}", f"--epochs={EPOCHS}", f"--images={IMAGES}", "--concurrent=1"),
        *("--sampler=random", "--scheduler=none", "--cpus-per-trial=1"),
    ]
    begun = time.perf_counter()
    subprocess.run([*CL_RAY, "tune", *flags], check=True)
    seconds = time.perf_counter() - begun
    return seconds, json.loads((folder / "s" / "leaderboard.json").read_text())


def run_loop(rows: list[dict[str, Any]]) -> float:
    """Return the seconds of the same training and evaluation in a plain loop."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = subset_dataset(Dataset.open("mnist"), IMAGES)
    base = merge(Config().model_dump(), {**FIELDS, "epochs": EPOCHS})
    begun = time.perf_counter()
    evaluator = Evaluator(dataset, Config.model_validate(base).evaluation)
    for row in rows:
        config = Config.model_validate(merge(base, unflatten(row["values"])))
        trainer = build_trainer(config, dataset)
        for _ in range(row["epoch"]):
            try:
                trainer.train_epoch()
            except NonFiniteLossError:
                break
            evaluator.evaluate(TrainedModel.from_trainer(trainer))
    return time.perf_counter() - begun


def main() -> None:
    console = Console()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        seconds, rows = run_search(folder)
        # The trials alone: from the first one's folder to the last write to the study.
        runs = folder / "s" / "trials"
        first = min((p / "config.yaml").stat().st_mtime for p in runs.iterdir())
        trials_seconds = (folder / "s" / "study.log").stat().st_mtime - first
        loop = run_loop(rows)
    console.print(f"search {seconds:.1f} s, its trials {trials_seconds:.1f} s; loop {loop:.1f} s")
    console.print(f"ratio {trials_seconds / loop:.2f}, with Ray's start {seconds / loop:.2f}")
    console.print(f"overhead of a trial {(trials_seconds - loop) / TRIALS:.2f} s")


if __name__ == "__main__":
    main()
