"""images/s of a step on a GPU: kernel by kernel, and recorded as a CUDA graph.

`python benchmarks/gpu.py` measures both in turn for each family, batch and precision, over the
quick preset, and prints the ratio.
"""

import time
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

from cl_ray.config import build_config, merge, preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.networks.build import FAMILIES
from cl_ray.trainer import Trainer

BATCHES = (64, 512)
PRECISIONS = ("float32", "bfloat16")
WARM, STEPS = 5, 25


def measure(run: Trainer, recorded: bool) -> float:
    """Pairs a second, drawing them included."""
    gan = run.gan
    if not recorded:
        gan.update = gan._update
    batches = run.shard.batches(0)
    for _ in range(WARM):
        gan.step(next(batches))
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(STEPS):
        gan.step(next(batches))
    torch.cuda.synchronize()
    return STEPS * run.config.batch_size / (time.perf_counter() - begun)


def main() -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        raise SystemExit("This measures a CUDA GPU, and there is none here.")
    torch.set_num_threads(1)
    data = Dataset.open("mnist")
    head = "family", "batch", "precision", "kernel by kernel", "recorded", "ratio"
    table = Table(*head, title=f"pairs/s, {torch.cuda.get_device_name()}")
    for family, batch, precision in product(FAMILIES, BATCHES, PRECISIONS):
        fields = {
            "batch_size": batch,
            "precision": precision,
            "device": "cuda",
            "generator": {"family": family},
            "discriminator": {"family": family},
        }
        config = build_config(merge(preset("quick").model_dump(), fields))
        device, dtype = resolve_device(config.device, config.precision)
        speeds = [
            measure(
                Trainer(
                    config, InMemoryLoader.read(Partition(data, config), device), device, dtype
                ),
                kind,
            )
            for kind in (False, True)
        ]
        shown = f"{speeds[0]:.0f}", f"{speeds[1]:.0f}", f"[bold]{speeds[1] / speeds[0]:.1f}"
        table.add_row(family, str(batch), precision, *shown)
    Console().print(table)


if __name__ == "__main__":
    main()
