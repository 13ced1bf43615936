"""A run folder made in this process, without Ray."""

from pathlib import Path
from typing import Any

from cl_ray.checkpoint import Checkpoints
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.shards import ResidentShard
from cl_ray.data.share import Share
from cl_ray.run import Run
from cl_ray.training.folder import Folder

SMALL = {"depth": 2, "width": 4}


def begun(data: str, **fields: Any) -> Run:
    """A run of small networks before its first step."""
    small = {"batch_size": 32, "generator": SMALL, "discriminator": SMALL, **fields}
    config = Config(data=data, **small)
    return Run(config, ResidentShard.read(Share(Dataset.open(data), config)))


def trained_run(data: str, **fields: Any) -> Run:
    """The same after an epoch."""
    run = begun(data, **fields)
    run.epoch()
    return run


def leave(run: Run, storage: Path, step: int) -> Path:
    """Writes the run's folder, with one checkpoint of that step."""
    folder = Folder.at(str(storage), "demo")
    folder.write("config.yaml", run.config.to_yaml().encode())
    Checkpoints(*folder.open()).save(run.state_dict(), epoch=1, step=step, figure=0.5)
    return Path(folder.uri)
