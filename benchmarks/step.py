"""images/s of `Adversary.step` against the textbook loop, and whether both learn alike.

`python benchmarks/step.py` runs the two in turn, each in a process of its own (the textbook's
has the C library's memory as it comes), and prints the ratio round by round.
"""

import os
import statistics
import subprocess
import sys
import time

import torch
from rich.console import Console
from rich.table import Table
from textbook import Textbook

from cl_ray.config import preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import keep_freed_memory, resolve_device
from cl_ray.gan import ContrastiveGAN

ROUNDS, WARM, STEPS = 3, 5, 40
SHAPE = (28, 28, 1)


def measure(kind: str, threads: int) -> float:
    """images/s (pairs a second) of one of the two in this process."""
    torch.set_num_threads(threads)
    config = preset("quick")
    shard = InMemoryLoader.read(Partition(Dataset.open("mnist"), config))
    if kind == "textbook":
        step = Textbook(config, SHAPE).step
    else:
        keep_freed_memory()
        device, dtype = resolve_device(config.device, config.precision)
        step = ContrastiveGAN(config, SHAPE, device, dtype).step
    batches = shard.batches(0)
    for _ in range(WARM):
        step(next(batches))
    begun = time.perf_counter()
    for _ in range(STEPS):
        step(next(batches))
    return STEPS * config.batch_size / (time.perf_counter() - begun)


def main() -> None:
    """Print the table."""
    threads = len(os.sched_getaffinity(0))
    _, dtype = resolve_device()
    table = Table("round", "textbook", "Adversary.step", "ratio", title=f"pairs/s, {dtype}")
    ratios = []
    for number in range(ROUNDS):
        speeds = [
            float(subprocess.check_output([sys.executable, __file__, kind, str(threads)]))
            for kind in ("textbook", "gan")
        ]
        ratios.append(speeds[1] / speeds[0])
        table.add_row(str(number + 1), *(f"{s:.0f}" for s in speeds), f"{ratios[-1]:.2f}")
    table.add_row("median", "", "", f"[bold]{statistics.median(ratios):.2f}")
    Console().print(table)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
    else:
        main()
