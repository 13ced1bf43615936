"""Measure pairs/s of `ContrastiveGAN.train_step` against a textbook loop in float32.

`python benchmarks/step.py` runs the loop, the step in float32 and the step in the device's own
precision in turn, each in a process of its own, and prints the ratios of each round.
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
    """Return pairs/s of `textbook`, or of the step in a precision, in this process."""
    torch.set_num_threads(threads)
    textbook = kind == "textbook"
    if not textbook:
        keep_freed_memory()
    config = cell_config("", losses=LOSSES, precision="float32" if textbook else kind)
    trainer = build_trainer(config)
    gan = TextbookGAN(config, SHAPE) if textbook else trainer.gan
    return pairs_per_second(gan.train_step, trainer.loader.batches(0), WARMUP, STEPS)


def measure_rounds() -> Iterator[tuple[float, ...]]:
    """Yield pairs/s of the loop and of the step in both precisions, and the ratios."""
    threads = str(len(os.sched_getaffinity(0)))
    for _ in range(ROUNDS):
        textbook, same, auto = (
            measure_alone(__file__, kind, threads) for kind in ("textbook", "float32", "auto")
        )
        yield textbook, same, auto, same / textbook, auto / textbook


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(measure(sys.argv[1], int(sys.argv[2])))
    else:
        names = ("textbook", "float32", "auto", "ratio of float32", "ratio of auto")
        columns = {name: "{:.2f}" if "ratio" in name else "{:.0f}" for name in names}
        print_rounds(f"pairs/s, auto is {resolve_device()[1]}", columns, measure_rounds())
