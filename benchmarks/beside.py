"""What a busy program beside costs a step: threads where Linux puts them, and a core for each.

`python benchmarks/beside.py` trains the quick preset in a process of its own for some seconds, by
turns with and without `cl_ray/training/cores.py`, alone and beside an endless loop in a session of
its own, as another program of a desktop is. A process that takes no step in `PATIENCE` seconds
is ended and counts as none.
"""

import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import product

import torch
from rich.console import Console
from rich.table import Table

from cl_ray.config import preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import keep_freed_memory, resolve_device
from cl_ray.trainer import Trainer
from cl_ray.training.cpu_affinity import CpuAffinity

ROUNDS = 3
WARM, SECONDS, PATIENCE = 5, 5.0, 60.0
BUSY = [sys.executable, "-c", "while True: pass"]


def rate(placed: bool) -> float:
    """Pairs a second of this process."""
    threads = os.cpu_count() or 1
    torch.set_num_threads(threads)
    cores = CpuAffinity(threads) if placed else nullcontext()
    keep_freed_memory()
    config = preset("quick")
    device, dtype = resolve_device(config.device, config.precision)
    shard = InMemoryLoader.read(Partition(Dataset.open(config.data), config), device)
    gan = Trainer(config, shard, device, dtype).gan
    batches = shard.batches(0)
    with cores:
        for _ in range(WARM):
            gan.step(next(batches))
        begun = time.perf_counter()
        first = gan.steps
        while time.perf_counter() - begun < SECONDS:
            gan.step(next(batches))
        return (gan.steps - first) * config.batch_size / (time.perf_counter() - begun)


def measure(placed: bool, beside: bool) -> float:
    """The same of a new process, with another one beside or not."""
    other = subprocess.Popen(BUSY, start_new_session=True) if beside else None
    try:
        command = [sys.executable, __file__, "placed" if placed else "free"]
        return float(subprocess.check_output(command, timeout=PATIENCE))
    except subprocess.TimeoutExpired:
        return 0.0
    finally:
        if other:
            other.kill()
            other.wait()


def main() -> None:
    """Print the table."""
    if len(sys.argv) > 1:
        print(rate(sys.argv[1] == "placed"))
        return
    cells = list(product((False, True), (False, True)))
    found: dict[tuple[bool, bool], list[float]] = {cell: [] for cell in cells}
    for _, cell in product(range(ROUNDS), cells):
        found[cell].append(measure(*cell))
    table = Table("threads", "alone", "beside a busy program", title="pairs/s, medians")
    for placed, name in ((False, "where Linux puts them"), (True, "a core for each")):
        medians = (statistics.median(found[placed, beside]) for beside in (False, True))
        table.add_row(name, *(f"{median:.0f}" for median in medians))
    Console().print(table)


if __name__ == "__main__":
    main()
