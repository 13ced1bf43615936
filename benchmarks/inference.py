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
import subprocess
import sys
import tempfile
import time

import torch
from bare import measure_alone, print_rounds
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


def measure(run: str, what: str) -> dict[str, float]:
    """Take one measurement in a process of its own."""
    with tempfile.TemporaryDirectory() as out:
        return dict(measure_alone(__file__, run, what, f"{out}/out.parquet"))


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
    rounds = [(measure(run, "bare")["speed"], measure(run, "embed")) for _ in range(ROUNDS)]
    columns = {"bare": "{:.0f}", "pool": "{:.0f}", "ratio": "{:.2f}", "steady": "{:.0f}"}
    rows = [
        (bare, pool["speed"], pool["speed"] / bare, pool["steady"], pool["steady"] / bare,
         pool["start"])
        for bare, pool in rounds
    ]  # fmt: skip
    print_rounds("embed, images/s", {**columns, "its ratio": "{:.2f}", "start": "{:.1f} s"}, rows)
    memory = Table("images", "images/s", "an actor, MB", "the driver, MB", title="generate")
    few, many = (measure(run, str(count)) for count in COUNTS)
    for count, found in zip(COUNTS, (few, many), strict=True):
        memory.add_row(f"{count:,}", *(f"{found[k]:.0f}" for k in ("speed", "actor", "driver")))
    memory.add_row("ratio", "", *(f"[bold]{many[k] / few[k]:.3f}" for k in ("actor", "driver")))
    Console().print(memory)
    times = [measure_commands(run) for _ in range(ROUNDS)]
    columns = {"cl-ray generate": "{:.1f}", "in Python": "{:.1f}", "ratio": "{:.2f}"}
    print_rounds("generate 10,000, s", columns, [(a, b, a / b) for a, b in times])


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
