"""CPU seconds of one thread until a preset's samples and features are as good as asked.

    python benchmarks/time_to_quality.py --seeds 3
    python benchmarks/time_to_quality.py --cells "" "optimizer.algorithm=adam" --frechet 10
    PYTHONPATH=../other-checkout python benchmarks/time_to_quality.py  # the same of other code

A cell is a preset with some fields changed. For each budget, in steps, it is trained anew: a rate
that decays depends on the length of the run. The first budget whose Fréchet distance is at most
`--frechet` times that of as many training images, and whose linear probe has `--probe` percent,
ends it. Both are measured on the validation split; set-up and evaluation do not count, the fit of
the prior does. Other programs on the machine change the time little, as it is the thread's own.
"""

import time
from pathlib import Path
from typing import Any

import torch
import tyro
from bare import append_row, build_evaluator, build_trainer, cell_config, train_until
from rich.console import Console

from cl_ray.config import Config
from cl_ray.device import describe_device, keep_freed_memory, resolve_device
from cl_ray.model import TrainedModel
from cl_ray.trainer import Trainer

METRICS = ("frechet_over_baseline", "recall", "coverage", "linear_probe", "knn_1", "few_labels")


class BudgetTrainer(Trainer):
    """A trainer whose rates are those of a run of as many steps as it saves a checkpoint after."""

    def lr_scale(self) -> float:
        """Return the next step's fraction of the learning rates."""
        return self.config.lr_scale(self.gan.steps, self.config.checkpoint.every)


def train(config: Config, steps: int) -> tuple[Trainer, float]:
    """Train for some steps; return the trainer and its CPU seconds."""
    budget = config.checkpoint.model_copy(update={"every": steps})  # it logs there, and stops
    config = config.model_copy(update={"checkpoint": budget})
    trainer = build_trainer(config, kind=BudgetTrainer)
    began = time.process_time()
    train_until(trainer, lambda log: log.step == steps)
    return trainer, time.process_time() - began


def main(
    cells: tuple[str, ...] = ("",),
    seeds: int = 1,
    budgets: tuple[int, ...] = (430, 645, 860, 1290, 1720, 2580, 3440),
    frechet: float = 10.0,
    probe: float = 98.0,
    preset_name: str = "quick",
    data: str = "mnist",
    out: Path = Path("runs/time_to_quality.jsonl"),
) -> None:
    """Train each cell with growing budgets until it is good enough.

    Args:
        cells: Fields and values, separated by spaces.
        seeds: Seeds of each cell, from 0.
        budgets: Steps to try, in this order.
        frechet: Fréchet distance to reach, over that of training images.
        probe: Accuracy of the linear probe to reach, in percent.
        preset_name: What a cell changes.
        data: What is trained on.
        out: JSON Lines file; a row for each training is appended.
    """
    console = Console(soft_wrap=True, highlight=False)
    torch.set_num_threads(1)
    keep_freed_memory()
    evaluator = build_evaluator(data)
    for cell in cells:
        for seed in range(seeds):
            config = cell_config(cell, preset_name, seed=seed, data=data, device="cpu")
            for steps in budgets:
                trainer, spent = train(config, steps)
                metrics = evaluator.evaluate(TrainedModel.from_trainer(trainer)).metrics()
                row: dict[str, Any] = {
                    "cell": cell, "seed": seed, "steps": steps, "seconds": round(spent, 1),
                    "on": describe_device(*resolve_device("cpu", config.precision)),
                    **{name: round(metrics[name], 4) for name in METRICS if name in metrics},
                }  # fmt: skip
                console.print(row)
                append_row(out, row)
                good = metrics["frechet_over_baseline"] <= frechet
                if good and 100 * metrics["linear_probe"] >= probe:
                    console.print(f"{cell or preset_name}, seed {seed}: reached in {spent:.0f} s.")
                    break
            else:
                console.print(f"{cell or preset_name}, seed {seed}: not reached.")


if __name__ == "__main__":
    tyro.cli(main)
