"""Training without Ray, which several benchmarks measure or compare with."""

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.trainer import Trainer


def build_trainer(config: Config, dataset: Dataset | None = None) -> Trainer:
    """Build a trainer in this process, on the config's data or on another dataset."""
    device, dtype = resolve_device(config.device, config.precision)
    partition = Partition(dataset or Dataset.open(config.data), config)
    return Trainer(config, InMemoryLoader.read(partition, device), device, dtype)
