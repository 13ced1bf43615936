"""Training without Ray, which several benchmarks measure or compare with."""

from collections.abc import Callable
from typing import Any

import yaml

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.step_log import StepLog
from cl_ray.trainer import Trainer
from cl_ray.tuning.space import unflatten


class _Spent(Exception):
    pass


def build_trainer(config: Config, dataset: Dataset | None = None) -> Trainer:
    """Build a trainer in this process, on the config's data or on another dataset."""
    device, dtype = resolve_device(config.device, config.precision)
    partition = Partition(dataset or Dataset.open(config.data), config)
    return Trainer(config, InMemoryLoader.read(partition, device), device, dtype)


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


def cell_fields(cell: str) -> dict[str, Any]:
    """Return the fields of a cell, written as `losses.r1=1 seed=3`, as a tree."""
    changes = (assignment.split("=") for assignment in cell.split())
    return unflatten({name: yaml.safe_load(text) for name, text in changes})
