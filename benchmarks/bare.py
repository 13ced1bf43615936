"""The project's own training with nothing around it: what searches are held against."""

from collections.abc import Iterator

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.shards import ResidentShard
from cl_ray.data.share import Share
from cl_ray.loading import LoadedRun
from cl_ray.run import Run
from cl_ray.training.device import resolve


def passes(config: Config, dataset: Dataset) -> Iterator[LoadedRun]:
    """Train in this process.

    Args:
        config: What to train; `epochs` passes of it.
        dataset: On what.

    Yields:
        The averaged G and D after each pass.

    Raises:
        Diverged: A loss is no number.
    """
    device, dtype = resolve(config)
    run = Run(config, ResidentShard.read(Share(dataset, config), device), device, dtype)
    for _ in range(config.epochs):
        run.epoch()
        adversary = run.adversary
        yield LoadedRun(
            config=config,
            shape=adversary.shape,
            checkpoint="",
            step=adversary.steps,
            generator=adversary.averaged,
            discriminator=adversary.discriminator,
            device=device,
            classes=adversary.classes,
        )
