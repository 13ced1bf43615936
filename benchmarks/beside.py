"""Cost of a busy program on the same cores, by where the threads of a step are placed.

`python benchmarks/beside.py` trains the quick preset for some seconds in processes of their own,
alone and beside an endless loop in a session of its own, as another program of a desktop is. The
placements take turns: Linux's, `CpuAffinity`, and OpenMP's OMP_PROC_BIND, with
one process of all threads and with one process of one thread for each core, as workers are.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from itertools import product
from typing import Any

import torch
from bare import build_trainer
from rich.console import Console
from rich.table import Table

from cl_ray.config import preset
from cl_ray.device import CpuAffinity, keep_freed_memory

ROUNDS = 3
WARMUP_STEPS, SECONDS, TIMEOUT = 5, 5.0, 60.0
BUSY = [sys.executable, "-c", "while True: pass"]
CORES = os.cpu_count() or 1
BOUND = {"OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
PLACEMENTS = ("Linux", "CpuAffinity", "OMP_PROC_BIND")


def pairs_per_second(placement: str, threads: int) -> float:
    """Train in this process."""
    torch.set_num_threads(threads)
    affinity = CpuAffinity(threads) if placement == "CpuAffinity" else nullcontext()
    keep_freed_memory()
    config = preset("quick")
    trainer = build_trainer(config)
    gan, batches = trainer.gan, trainer.loader.batches(0)
    with affinity:
        for _ in range(WARMUP_STEPS):
            gan.train_step(next(batches))
        started, first = time.perf_counter(), gan.steps
        while time.perf_counter() - started < SECONDS:
            gan.train_step(next(batches))
        return (gan.steps - first) * config.batch_size / (time.perf_counter() - started)


def measure(placement: str, processes: int, beside: bool) -> float:
    """Sum over new processes that share the cores; 0 if one takes no five steps in TIMEOUT."""
    busy = subprocess.Popen(BUSY, start_new_session=True) if beside else None
    environment = os.environ | (BOUND if placement == "OMP_PROC_BIND" else {})
    command = [sys.executable, __file__, placement, str(CORES // processes)]
    started: list[subprocess.Popen[Any]] = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    try:
        return sum(json.loads(process.communicate(timeout=TIMEOUT)[0]) for process in started)
    except subprocess.TimeoutExpired:
        return 0.0
    finally:
        for process in [*started, *([busy] if busy else [])]:
            process.kill()
            process.wait()


def main() -> None:
    if len(sys.argv) > 1:
        print(pairs_per_second(sys.argv[1], int(sys.argv[2])))
        return
    cells = list(product(PLACEMENTS, (1, CORES), (False, True)))
    found: dict[tuple[str, int, bool], list[float]] = {cell: [] for cell in cells}
    for _, cell in product(range(ROUNDS), cells):
        found[cell].append(measure(*cell))
    columns = ("1 process", "1 process, beside", f"{CORES} processes", f"{CORES}, beside")
    table = Table("placement", *columns, title="pairs/s in all, medians")
    for placement in PLACEMENTS:
        medians = (
            f"{statistics.median(found[placement, processes, beside]):.0f}"
            for processes, beside in product((1, CORES), (False, True))
        )
        table.add_row(placement, *medians)
    Console().print(table)


if __name__ == "__main__":
    main()
