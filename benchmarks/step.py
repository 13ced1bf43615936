"""Measure pairs/s of `ContrastiveGAN.train_step` against a textbook loop.

`python benchmarks/step.py` runs both in turn, each in a process of its own, and prints the ratio of
each round.
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from textbook import TextbookGAN

from cl_ray.config import Config, merge, preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import keep_freed_memory, resolve_device
from cl_ray.gan import ContrastiveGAN

ROUNDS, WARMUP, STEPS = 3, 5, 40
SHAPE = (28, 28, 1)
LOSSES = {"objective": "non-saturating", "gradient_penalty": 0, "approximate_r1": 0.05}
"""Those that the textbook loop has."""


def measure(kind: str, threads: int) -> float:
    """Return pairs/s of `textbook` or `gan` in this process."""
    torch.set_num_threads(threads)
    config = Config.model_validate(merge(preset("quick").model_dump(), {"losses": LOSSES}))
    batches = InMemoryLoader.read(Partition(Dataset.open("mnist"), config)).batches(0)
    gan: TextbookGAN | ContrastiveGAN = TextbookGAN(config, SHAPE)
    if kind == "gan":
        keep_freed_memory()
        gan = ContrastiveGAN(config, SHAPE, *resolve_device(config.device, config.precision))
    for _ in range(WARMUP):
        gan.train_step(next(batches))
    start = time.perf_counter()
    for _ in range(STEPS):
        gan.train_step(next(batches))
    return STEPS * config.batch_size / (time.perf_counter() - start)


def main() -> None:
    threads = str(len(os.sched_getaffinity(0)))
    _, dtype = resolve_device()
    table = Table("round", "textbook", "ContrastiveGAN", "ratio", title=f"pairs/s, {dtype}")
    ratios = []
    for number in range(ROUNDS):
        textbook, ours = (
            float(subprocess.check_output([sys.executable, __file__, kind, threads]))
            for kind in ("textbook", "gan")
        )
        ratios.append(ours / textbook)
        table.add_row(str(number + 1), f"{textbook:.0f}", f"{ours:.0f}", f"{ratios[-1]:.2f}")
    table.add_row("median", "", "", f"[bold]{statistics.median(ratios):.2f}")
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
    else:
        main()
