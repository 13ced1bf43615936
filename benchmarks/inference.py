"""What `cl-ray embed` and `cl-ray generate` cost beside bare PyTorch, and what memory they hold.

`python benchmarks/inference.py runs/demo`, round by round:

- embed 60,000 packaged digits: images/s of the pool, from the moment that its first actor begins
  with its first part until all parts are read, computed and written, against a bare loop over the
  same arrays in memory, which writes nothing. Both use all cores, blocks of the same size and the
  C library's memory kept. What the pool takes to start is shown apart; `steady` leaves out its
  first third, in which its actors begin one after another and load what they work with, which is
  a good part of so short a job.
- generate 10,000 and 100,000 digits: the most memory that an actor and the driver held.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from rich.console import Console
from rich.table import Table

from cl_ray.data.dataset import Dataset
from cl_ray.device import keep_freed_memory
from cl_ray.inference.pool import peak_memory, prepare, produce, share_out
from cl_ray.inference.work import Embed, FromNoise, Work
from cl_ray.model import load
from cl_ray.training.cluster import ray_session

ROUNDS = 3
COUNTS = (10_000, 100_000)


def bare(run: str) -> dict[str, float]:
    """images/s of a loop in this process."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    loaded = load(run, device="cpu")
    images = Dataset.open("mnist").read("train").image
    loaded.embed(images[:2000])
    begun = time.perf_counter()
    loaded.embed(images)
    return {"speed": len(images) / (time.perf_counter() - begun)}


def pooled(run: str, work: Work, out: str) -> dict[str, float]:
    """images/s of the pool, its seconds before the first part, and peaks of memory."""
    begun = time.perf_counter()
    job = prepare(run, work, out)
    with ray_session(None, False, False, Console(stderr=True)) as local:
        pool = share_out(None, None, None, local, len(job.missing))
        made = list(produce(job, pool))
        start = time.perf_counter() - begun - made[-1].seconds
    third, last = made[len(made) // 3], made[-1]
    return {
        "speed": last.images / last.seconds,
        "steady": (last.images - third.images) / (last.seconds - third.seconds),
        "start": start,
        "actor": last.peak / 1e6,
        "driver": peak_memory() / 1e6,
    }


def measured(run: str, what: str) -> dict[str, float]:
    """One measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, run, what, f"{out}/out.parquet"]
        return dict(json.loads(subprocess.check_output(command).splitlines()[-1]))


def main(run: str) -> None:
    """Print the tables."""
    names = ("round", "bare", "pool", "ratio", "steady", "ratio", "starting")
    speeds = Table(*names, title="embed, images/s")
    ratios: dict[str, list[float]] = {"speed": [], "steady": []}
    for number in range(ROUNDS):
        alone, pool = measured(run, "bare"), measured(run, "embed")
        row = [str(number + 1), f"{alone['speed']:.0f}"]
        for kind, of_kind in ratios.items():
            of_kind.append(pool[kind] / alone["speed"])
            row += [f"{pool[kind]:.0f}", f"{of_kind[-1]:.2f}"]
        speeds.add_row(*row, f"{pool['start']:.1f} s")
    middle = [f"[bold]{statistics.median(of_kind):.2f}" for of_kind in ratios.values()]
    speeds.add_row("median", "", "", middle[0], "", middle[1], "")
    memory = Table("images", "images/s", "an actor, MB", "the driver, MB", title="generate")
    few, many = (measured(run, str(count)) for count in COUNTS)
    for count, seen in zip(COUNTS, (few, many), strict=True):
        memory.add_row(f"{count:,}", *(f"{seen[k]:.0f}" for k in ("speed", "actor", "driver")))
    memory.add_row("ratio", "", *(f"[bold]{many[k] / few[k]:.3f}" for k in ("actor", "driver")))
    console = Console()
    console.print(speeds)
    console.print(memory)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        run, what, out = sys.argv[1:]
        if what == "bare":
            found = bare(run)
        elif what == "embed":
            found = pooled(run, Embed(Dataset.open("mnist"), "train"), out)
        else:
            found = pooled(run, FromNoise(int(what), seed=0), out)
        print(json.dumps(found))
