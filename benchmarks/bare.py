"""Training without Ray or a search: the baseline of `benchmarks/tuning.py`."""

from collections.abc import Iterator

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.model import TrainedModel
from cl_ray.trainer import Trainer


def train_epochs(config: Config, dataset: Dataset) -> Iterator[TrainedModel]:
    """Train `config.epochs` epochs in this process; yield the networks after each.

    Raises:
        NonFiniteLossError: A loss is NaN or Inf.
    """
    device, dtype = resolve_device(config.device, config.precision)
    loader = InMemoryLoader.read(Partition(dataset, config), device)
    trainer = Trainer(config, loader, device, dtype)
    for _ in range(config.epochs):
        trainer.train_epoch()
        yield TrainedModel.from_trainer(trainer)
