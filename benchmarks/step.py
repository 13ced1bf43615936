"""Measure pairs/s of `ContrastiveGAN.train_step` against a textbook loop.

`python benchmarks/step.py` runs both in turn, each in a process of its own, and prints the ratio of
each round.
"""

import os
import sys
from collections.abc import Iterator

import torch
from bare import build_trainer, cell_config, measure_alone, pairs_per_second, print_rounds
from textbook import TextbookGAN

from cl_ray.device import keep_freed_memory, resolve_device

ROUNDS, WARMUP, STEPS = 3, 5, 40
SHAPE = (28, 28, 1)
LOSSES = {"objective": "non-saturating", "gradient_penalty": 0, "approximate_r1": 0.05}
"""Those that the textbook loop has."""


def measure(kind: str, threads: int) -> float:
    """Return pairs/s of `textbook` or `gan` in this process."""
    torch.set_num_threads(threads)
    if kind == "gan":
        keep_freed_memory()
    config = cell_config("", losses=LOSSES)
    trainer = build_trainer(config)
    gan = trainer.gan if kind == "gan" else TextbookGAN(config, SHAPE)
    return pairs_per_second(gan.train_step, trainer.loader.batches(0), WARMUP, STEPS)


def measure_rounds() -> Iterator[tuple[float, float, float]]:
    """Yield pairs/s of both, and the ratio."""
    threads = str(len(os.sched_getaffinity(0)))
    for _ in range(ROUNDS):
        textbook, ours = (measure_alone(__file__, kind, threads) for kind in ("textbook", "gan"))
        yield textbook, ours, ours / textbook


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
    else:
        columns = {"textbook": "{:.0f}", "ContrastiveGAN": "{:.0f}", "ratio": "{:.2f}"}
        print_rounds(f"pairs/s, {resolve_device()[1]}", columns, measure_rounds())
