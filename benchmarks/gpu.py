"""Measure pairs/s of a training step on a GPU: eager, and replayed as a CUDA graph.

    python benchmarks/gpu.py

Measures both in turn for each network family, batch size and precision, with the quick preset's
networks. Loading the pairs is included.
"""

import time
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

from cl_ray.config import Config, build_config, merge, preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.networks.build import FAMILIES
from cl_ray.trainer import Trainer

BATCH_SIZES = (64, 512)
PRECISIONS = ("float32", "bfloat16")
WARMUP, STEPS = 5, 25


def measure(config: Config, dataset: Dataset, eager: bool) -> float:
    """Measure pairs/s of one training step."""
    device, dtype = resolve_device(config.device, config.precision)
    loader = InMemoryLoader.read(Partition(dataset, config), device)
    gan = Trainer(config, loader, device, dtype).gan
    if eager:
        gan._graphed_update.enabled = False
    batches = loader.batches(0)
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            torch.cuda.synchronize()
            began = time.perf_counter()
        gan.train_step(next(batches))
    torch.cuda.synchronize()
    return STEPS * config.batch_size / (time.perf_counter() - began)


def main() -> None:
    """Print the table."""
    if not torch.cuda.is_available():
        raise SystemExit("This measures a CUDA GPU, and there is none here.")
    torch.set_num_threads(1)
    dataset = Dataset.open("mnist")
    columns = "family", "batch size", "precision", "eager", "CUDA graph", "ratio"
    table = Table(*columns, title=f"pairs/s, {torch.cuda.get_device_name()}")
    for family, batch_size, precision in product(FAMILIES, BATCH_SIZES, PRECISIONS):
        fields = {
            "batch_size": batch_size,
            "precision": precision,
            "device": "cuda",
            "generator": {"family": family},
            "discriminator": {"family": family},
        }
        config = build_config(merge(preset("quick").model_dump(), fields))
        eager, graph = (measure(config, dataset, kind) for kind in (True, False))
        row = family, str(batch_size), precision, f"{eager:.0f}", f"{graph:.0f}"
        table.add_row(*row, f"[bold]{graph / eager:.1f}")
    Console().print(table)


if __name__ == "__main__":
    main()
