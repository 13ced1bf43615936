"""Training without Ray, and what else several benchmarks share."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.table import Table

from cl_ray.batch import PairBatch
from cl_ray.config import Config, build_config, merge, preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.step_log import StepLog
from cl_ray.trainer import Trainer
from cl_ray.tuning.space import unflatten

sys.path.append(str(Path(__file__).parents[1] / "tests"))  # some share code with the tests

CL_RAY = [sys.executable, "-m", "cl_ray"]


class _Spent(Exception):
    pass


def build_trainer(
    config: Config, dataset: Dataset | None = None, kind: type[Trainer] = Trainer
) -> Trainer:
    """Build a trainer in this process, on the config's data or on another dataset."""
    device, dtype = resolve_device(config.device, config.precision)
    partition = Partition(dataset or Dataset.open(config.data), config)
    return kind(config, InMemoryLoader.read(partition, device), device, dtype)


def train_until(trainer: Trainer, is_spent: Callable[[StepLog], bool]) -> None:
    """Train until the budget is spent after a log, and fit the prior."""

    def check(log: StepLog) -> None:
        if is_spent(log):
            raise _Spent

    try:
        while True:
            trainer.train_epoch(check)
    except _Spent:
        trainer.fit_prior()


def pairs_per_second(
    train_step: Callable[[PairBatch], Any], batches: Iterator[PairBatch], warmup: int, steps: int
) -> float:
    """Measure steps after some that are not counted; the CPU or the GPU may be used."""
    for step in range(warmup + steps):
        if step == warmup:
            _synchronize()
            began = time.perf_counter()
        batch = next(batches)
        train_step(batch)
    _synchronize()
    return steps * len(batch.positive) / (time.perf_counter() - began)


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def cell_config(cell: str, name: str = "quick", **fields: Any) -> Config:
    """Build a preset with some fields, and those of a cell, written as `losses.r1=1 seed=3`."""
    changes = (assignment.split("=") for assignment in cell.split())
    tree = unflatten({name: yaml.safe_load(text) for name, text in changes})
    base = merge(preset(name).model_dump(), fields)
    return build_config(merge(base, tree), f"the cell {cell!r}")


def build_evaluator(data: str = "mnist") -> Evaluator:
    """Build an evaluator of 5,000 samples and 10,000 images."""
    return Evaluator(Dataset.open(data), EvaluationConfig(samples=5000, images=10_000))


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """Append a row to a JSON Lines file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def measure_alone(script: str, *arguments: str) -> Any:
    """Run a benchmark in a process of its own; return what its last line is, in JSON."""
    command = [sys.executable, script, *arguments]
    return json.loads(subprocess.check_output(command).splitlines()[-1])


def print_rounds(title: str, columns: Mapping[str, str], rounds: Iterable[Sequence[float]]) -> None:
    """Print a row for each round, and the medians; `columns` gives the format of each."""
    rows = [list(row) for row in rounds]
    table = Table("round", *columns, title=title)
    labels = [*map(str, range(1, len(rows) + 1)), "median"]
    rows.append([statistics.median(column) for column in zip(*rows, strict=True)])
    for label, row in zip(labels, rows, strict=True):
        table.add_row(label, *map(str.format, columns.values(), row))
    Console().print(table)
