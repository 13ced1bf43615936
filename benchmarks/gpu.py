"""Measure pairs/s of a training step on a GPU: eager, and replayed as a CUDA graph.

    python benchmarks/gpu.py
    python benchmarks/gpu.py collectives

The first measures both in turn for each network family, batch size and precision, with the quick
preset's networks; loading the pairs is included. The second measures steps of random pairs of 28,
64 and 128 pixels with the presets of these sizes, without a process group and in an NCCL group of
one process, which runs the collective operations of several workers.
"""

import sys
from collections.abc import Iterator
from itertools import product, repeat

import torch
import torch.distributed as dist
from bare import build_trainer, cell_config, pairs_per_second
from rich.console import Console
from rich.table import Table

from cl_ray.batch import PairBatch
from cl_ray.config import preset
from cl_ray.cuda_graph import release_graphs
from cl_ray.device import resolve_device
from cl_ray.gan import ContrastiveGAN
from cl_ray.networks.build import FAMILIES

BATCH_SIZES = (64, 512)
PRECISIONS = ("float32", "bfloat16")
SIZES = {"quick": (28, 28, 1), "photos-64": (64, 64, 3), "photos-128": (128, 128, 3)}
"""Shape of the images by preset."""
WARMUP, STEPS = 5, 25


def measure(gan: ContrastiveGAN, batches: Iterator[PairBatch], eager: bool) -> float:
    """Measure pairs/s of training steps."""
    if eager:
        gan._graphed_update.enabled = False
    speed = pairs_per_second(gan.train_step, batches, WARMUP, STEPS)
    release_graphs()
    return speed


def add_row(table: Table, words: list[str], eager: float, graph: float) -> None:
    """Add the speeds and their ratio to a table."""
    table.add_row(*words, f"{eager:.0f}", f"{graph:.0f}", f"[bold]{graph / eager:.1f}")


def measure_families(table: Table) -> None:
    """Measure each network family, batch size and precision."""
    for family, batch_size, precision in product(FAMILIES, BATCH_SIZES, PRECISIONS):
        config = cell_config(
            f"generator.family={family} discriminator.family={family}",
            batch_size=batch_size, precision=precision, device="cuda",
        )  # fmt: skip
        speeds = []
        for eager in (True, False):
            trainer = build_trainer(config)
            speeds.append(measure(trainer.gan, trainer.loader.batches(0), eager))
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
            speeds = []
            for eager in (True, False):
                gan = ContrastiveGAN(config, shape, *resolve_device("cuda", config.precision))
                speeds.append(measure(gan, repeat(batch), eager))
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
