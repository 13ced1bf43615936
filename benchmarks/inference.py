"""Measure `cl-ray embed` and `cl-ray generate` against bare PyTorch, and their memory.

    python benchmarks/inference.py runs/demo

- embed 60,000 packaged digits: images/s of the pool, from the start of its first part until all
  parts are read, computed and written, against a loop over the same arrays in memory that writes
  nothing. Both use all cores and the same batch size. Start-up is shown apart; `steady` leaves out
  the pool's first third, in which its actors start one after another.
- generate 10,000 and 100,000 digits: the largest memory of an actor and of the driver.
- generate 10,000 digits by the whole command `cl-ray generate`, which needs no Ray, against
  `cl_ray.load(RUN).generate(10_000)` in a process of its own: seconds from start to end.
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
from cl_ray.environment import peak_memory
from cl_ray.inference.actor_pool import allocate_actors, prepare_inference, run_inference
from cl_ray.inference.tasks import EmbedTask, GenerateTask, InferenceTask
from cl_ray.model import load
from cl_ray.training.ray_session import ray_session

ROUNDS = 3
COUNTS = (10_000, 100_000)


def measure_bare(run: str) -> dict[str, float]:
    """Measure images/s of a loop in this process."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    model = load(run, device="cpu")
    images = Dataset.open("mnist").read("train").image
    model.embed(images[:2000])
    began = time.perf_counter()
    model.embed(images)
    return {"speed": len(images) / (time.perf_counter() - began)}


def measure_pool(run: str, task: InferenceTask, out: str) -> dict[str, float]:
    """Measure images/s of a pool, its seconds of start-up, and peak memory in MB."""
    began = time.perf_counter()
    job = prepare_inference(run, task, out)
    with ray_session(None, False, False, Console(stderr=True)) as local:
        pool = allocate_actors(None, None, None, local, len(job.missing))
        progress = list(run_inference(job, pool))
        seconds = time.perf_counter() - began
    third, last = progress[len(progress) // 3], progress[-1]
    return {
        "speed": last.rows / last.seconds,
        "steady": (last.rows - third.rows) / (last.seconds - third.seconds),
        "start": seconds - last.seconds,
        "actor": last.peak_memory / 1e6,
        "driver": peak_memory() / 1e6,
    }


def measure_alone(run: str, what: str) -> dict[str, float]:
    """Take one measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, __file__, run, what, f"{out}/out.parquet"]
        return dict(json.loads(subprocess.check_output(command).splitlines()[-1]))


def measure_commands(run: str) -> tuple[float, float]:
    """Return the seconds of the command and of the same call in Python, each a whole process."""
    call = f"import cl_ray; cl_ray.load({run!r}).generate({COUNTS[0]})"
    seconds = []
    with tempfile.TemporaryDirectory() as out:
        generate = ["-m", "cl_ray", "generate", run, f"--count={COUNTS[0]}"]
        for arguments in ([*generate, f"--out={out}/digits.parquet"], ["-c", call]):
            began = time.perf_counter()
            subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL)
            seconds.append(time.perf_counter() - began)
    return seconds[0], seconds[1]


def main(run: str) -> None:
    names = ("round", "bare", "pool", "ratio", "steady", "ratio", "start-up")
    speeds = Table(*names, title="embed, images/s")
    ratios: dict[str, list[float]] = {"speed": [], "steady": []}
    for number in range(ROUNDS):
        bare, pool = measure_alone(run, "bare"), measure_alone(run, "embed")
        row = [str(number + 1), f"{bare['speed']:.0f}"]
        for kind, values in ratios.items():
            values.append(pool[kind] / bare["speed"])
            row += [f"{pool[kind]:.0f}", f"{values[-1]:.2f}"]
        speeds.add_row(*row, f"{pool['start']:.1f} s")
    medians = [f"[bold]{statistics.median(values):.2f}" for values in ratios.values()]
    speeds.add_row("median", "", "", medians[0], "", medians[1], "")
    memory = Table("images", "images/s", "an actor, MB", "the driver, MB", title="generate")
    few, many = (measure_alone(run, str(count)) for count in COUNTS)
    for count, found in zip(COUNTS, (few, many), strict=True):
        memory.add_row(f"{count:,}", *(f"{found[k]:.0f}" for k in ("speed", "actor", "driver")))
    memory.add_row("ratio", "", *(f"[bold]{many[k] / few[k]:.3f}" for k in ("actor", "driver")))
    console = Console()
    console.print(speeds)
    console.print(memory)
    whole = Table("round", "cl-ray generate", "in Python", "ratio", title="generate 10,000, s")
    times = [measure_commands(run) for _ in range(ROUNDS)]
    for number, (command, call) in enumerate(times, 1):
        whole.add_row(str(number), f"{command:.1f}", f"{call:.1f}", f"{command / call:.2f}")
    whole.add_row("median", "", "", f"[bold]{statistics.median(a / b for a, b in times):.2f}")
    console.print(whole)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(sys.argv[1])
    else:
        run, what, out = sys.argv[1:]
        if what == "bare":
            found = measure_bare(run)
        elif what == "embed":
            found = measure_pool(run, EmbedTask(Dataset.open("mnist"), "train"), out)
        else:
            found = measure_pool(run, GenerateTask(int(what), seed=0), out)
        print(json.dumps(found))
