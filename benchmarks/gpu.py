"""Measure pairs/s of a training step on a GPU: eager, and replayed as a CUDA graph.

    python benchmarks/gpu.py
    python benchmarks/gpu.py collectives

The first measures both in turn for each network family, batch size and precision, with the quick
preset's networks; loading the pairs is included. The second measures steps of random pairs of 28,
64 and 128 pixels with the presets of these sizes, without a process group and in an NCCL group of
one process, which runs the collective operations of several workers.
"""

import sys
import time
from collections.abc import Iterator
from itertools import product, repeat

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from cl_ray.batch import PairBatch
from cl_ray.config import Config, build_config, merge, preset
from cl_ray.cuda_graph import release_graphs
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.gan import ContrastiveGAN
from cl_ray.networks.build import FAMILIES

BATCH_SIZES = (64, 512)
PRECISIONS = ("float32", "bfloat16")
SIZES = {"quick": (28, 28, 1), "photos-64": (64, 64, 3), "photos-128": (128, 128, 3)}
"""Shape of the images by preset."""
WARMUP, STEPS = 5, 25


def measure(
    config: Config, shape: tuple[int, int, int], batches: Iterator[PairBatch], eager: bool
) -> float:
    """Measure pairs/s of training steps."""
    gan = ContrastiveGAN(config, shape, *resolve_device(config.device, config.precision))
    if eager:
        gan._graphed_update.enabled = False
    for step in range(WARMUP + STEPS):
        if step == WARMUP:
            torch.cuda.synchronize()
            began = time.perf_counter()
        gan.train_step(next(batches))
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    release_graphs()
    return STEPS * config.batch_size / seconds


def add_row(table: Table, words: list[str], eager: float, graph: float) -> None:
    """Add the speeds and their ratio to a table."""
    table.add_row(*words, f"{eager:.0f}", f"{graph:.0f}", f"[bold]{graph / eager:.1f}")


def measure_families(table: Table) -> None:
    """Measure each network family, batch size and precision."""
    dataset = Dataset.open("mnist")
    for family, batch_size, precision in product(FAMILIES, BATCH_SIZES, PRECISIONS):
        network = {"generator": {"family": family}, "discriminator": {"family": family}}
        fields = {"batch_size": batch_size, "precision": precision, "device": "cuda", **network}
        config = build_config(merge(preset("quick").model_dump(), fields))
        loader = InMemoryLoader.read(Partition(dataset, config), "cuda")
        shape = dataset.info.shape
        speeds = [measure(config, shape, loader.batches(0), eager) for eager in (True, False)]
        add_row(table, [family, str(batch_size), precision], *speeds)


def measure_collectives(table: Table) -> None:
    """Measure each size of images without a process group, and in one."""
    for group in ("none", "nccl"):
        if group == "nccl":
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(group, store=store, rank=0, world_size=1)
        for name, shape in SIZES.items():
            config = preset(name)
            size = config.batch_size
            images = torch.randint(0, 256, (2, size, *shape), dtype=torch.uint8, device="cuda")
            present = torch.ones(1, size, dtype=torch.bool, device="cuda")
            batch = PairBatch(images[0], images[0], images[1], present)
            speeds = [measure(config, shape, repeat(batch), eager) for eager in (True, False)]
            add_row(table, [name, str(size), group], *speeds)
    dist.destroy_process_group()


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("This measures a CUDA GPU, and there is none here.")
    torch.set_num_threads(1)
    if sys.argv[1:] == ["collectives"]:
        measured, heads = measure_collectives, ("preset", "batch size", "process group")
    else:
        measured, heads = measure_families, ("family", "batch size", "precision")
    title = f"pairs/s, {torch.cuda.get_device_name()}"
    table = Table(*heads, "eager", "CUDA graph", "ratio", title=title)
    measured(table)
    Console().print(table)


if __name__ == "__main__":
    main()
