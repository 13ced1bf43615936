"""A run folder that is made in this process, without Ray."""

from pathlib import Path
from typing import Any

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer

SMALL_NETWORK = {"depth": 2, "width": 4}


def build_trainer(data: str, **fields: Any) -> Trainer:
    """Return a trainer of small networks before its first step."""
    small = {"batch_size": 32, "generator": SMALL_NETWORK, "discriminator": SMALL_NETWORK}
    config = Config.model_validate({"data": data, **small, **fields})
    return Trainer(config, InMemoryLoader.read(Partition(Dataset.open(data), config)))


def trained_run(data: str, **fields: Any) -> Trainer:
    """Return a trainer after one epoch."""
    trainer = build_trainer(data, **fields)
    trainer.train_epoch()
    return trainer


def save_run(trainer: Trainer, storage: Path, step: int) -> Path:
    """Write a run folder with one checkpoint of that step; return the folder."""
    folder = RunStorage.at(str(storage), "demo")
    folder.write("config.yaml", trainer.config.to_yaml().encode())
    checkpoints = CheckpointStore(*folder.open())
    checkpoints.save(trainer.state_dict(), epoch=1, step=step, metric=0.5)
    return Path(folder.uri)
