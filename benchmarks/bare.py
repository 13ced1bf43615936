"""The project's own training with nothing around it: what searches are held against."""

from collections.abc import Iterator

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.model import TrainedModel
from cl_ray.trainer import Trainer


def passes(config: Config, dataset: Dataset) -> Iterator[TrainedModel]:
    """Train in this process.

    Args:
        config: What to train; `epochs` passes of it.
        dataset: On what.

    Yields:
        The EMA generator and D after each pass.

    Raises:
        Diverged: A loss is no number.
    """
    device, dtype = resolve_device(config.device, config.precision)
    run = Trainer(config, InMemoryLoader.read(Partition(dataset, config), device), device, dtype)
    for _ in range(config.epochs):
        run.train_epoch()
        yield TrainedModel.from_trainer(run)
