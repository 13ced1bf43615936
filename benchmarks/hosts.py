"""Cost of hosting: the same training without Ray, in Ray Train with one worker, and with two.

`python benchmarks/hosts.py` takes the three in turn, round by round, on 6,400 digits. It prints
their images/s, the fraction of an epoch spent waiting for data, and the seconds that an epoch costs
beyond its steps (checkpoint, sample images, report and barrier).
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from bare import CL_RAY, build_trainer, cell_config, measure_alone, print_rounds
from helpers.datasets import mnist, write_images

from cl_ray.device import keep_freed_memory
from cl_ray.metrics_file import read_epochs
from cl_ray.storage import RunStorage

ROUNDS, EPOCHS, IMAGES = 2, 3, 6_400
COLUMNS = {
    "bare": "{:.0f}", "1 worker": "{:.0f}", "2 workers": "{:.0f}", "1 / bare": "{:.3f}",
    "2 / 1": "{:.3f}", "data_time_fraction": "{:.2%}", "cost": "{:.2f}s",
}  # fmt: skip


def bare(data: str) -> list[dict[str, float]]:
    """Train without Ray; return the metrics of each epoch."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    keep_freed_memory()
    trainer = build_trainer(cell_config("", data=data))
    return [trainer.train_epoch() for _ in range(EPOCHS)]


def hosted(data: str, folder: Path, workers: int, number: int) -> tuple[list[Any], dict[str, Any]]:
    """Train with `cl-ray train`; return the metrics of each epoch and the summary."""
    name = f"w{workers}-{number}"
    flags = [f"--name={name}", f"--storage={folder}", f"--data={data}", f"--workers={workers}"]
    flags += [f"--epochs={EPOCHS}", "--evaluation.every=0"]
    command = [*CL_RAY, "train", "--preset=quick", *flags]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    summary = json.loads((folder / name / "summary.json").read_text())
    return read_epochs(RunStorage.at(str(folder), name)), summary


def speed(epochs: list[dict[str, float]]) -> float:
    """Return the median images/s of the epochs after the first, which warms up."""
    return statistics.median(e["images_per_second"] for e in epochs[1:])


def main() -> None:
    rows: list[list[float]] = []
    with tempfile.TemporaryDirectory() as scratch:
        data = write_images(Path(scratch, "digits"), train=mnist("train", IMAGES))
        for number in range(ROUNDS):
            alone = measure_alone(__file__, data)
            one, summary = hosted(data, Path(scratch), 1, number)
            two, _ = hosted(data, Path(scratch), 2, number)
            speeds = [speed(alone), speed(one), speed(two)]
            beyond = summary["training_seconds"] - sum(e["seconds"] for e in one)
            data_wait = statistics.median(e["data_time_fraction"] for e in one[1:])
            ratios = [speeds[1] / speeds[0], speeds[2] / speeds[1]]
            rows.append([*speeds, *ratios, data_wait, beyond / EPOCHS])
    print_rounds("images/s", COLUMNS, rows)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        print(json.dumps(bare(sys.argv[1])))
    else:
        main()
