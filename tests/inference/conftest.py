from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray

from cl_ray.checkpoint import Checkpoints
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.shards import ResidentShard
from cl_ray.data.share import Share
from cl_ray.run import Run
from cl_ray.training.folder import Folder

SMALL = {"depth": 2, "width": 4}


@pytest.fixture(scope="session")
def some_digits(make_digits: Any) -> str:
    """2,040 labelled digits: two row groups, the second one short."""
    return make_digits(2040)


@pytest.fixture(scope="session")
def trained(make_digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    digits = make_digits(64)
    config = Config(data=digits, batch_size=32, generator=SMALL, discriminator=SMALL)
    run = Run(config, ResidentShard.read(Share(Dataset.open(digits), config)))
    run.epoch()
    folder = Folder.at(str(tmp_path_factory.mktemp("runs")), "demo")
    folder.write("config.yaml", config.to_yaml().encode())
    Checkpoints(*folder.open()).save(run.state_dict(), epoch=1, step=2, figure=0.5)
    return Path(folder.uri)


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """Ray on two CPUs, whoever else uses them."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()
