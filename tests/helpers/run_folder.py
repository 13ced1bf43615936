"""A run folder made in this process, without Ray."""

from pathlib import Path
from typing import Any

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer

SMALL = {"depth": 2, "width": 4}


def begun(data: str, **fields: Any) -> Trainer:
    """A run of small networks before its first step."""
    small = {"batch_size": 32, "generator": SMALL, "discriminator": SMALL, **fields}
    config = Config(data=data, **small)
    return Trainer(config, InMemoryLoader.read(Partition(Dataset.open(data), config)))


def trained_run(data: str, **fields: Any) -> Trainer:
    """The same after an epoch."""
    run = begun(data, **fields)
    run.train_epoch()
    return run


def leave(run: Trainer, storage: Path, step: int) -> Path:
    """Writes the run's folder, with one checkpoint of that step."""
    folder = RunStorage.at(str(storage), "demo")
    folder.write("config.yaml", run.config.to_yaml().encode())
    CheckpointStore(*folder.open()).save(run.state_dict(), epoch=1, step=step, metric=0.5)
    return Path(folder.uri)
