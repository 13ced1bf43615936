"""Mode collapse: how many of the 1000 modes of Stacked MNIST configs find in equal time.

`python benchmarks/stacked.py --minutes 10 --out runs/stacked` trains each cell (the quick preset
with its fields changed) for so many minutes of its threads' own time, so that what else runs on the
machine costs it nothing, without Ray, and prints modes, KL, steps and images/s. A cell's result is
written as soon as it is there, and one that is there is not trained again, so the same command goes
on where it was stopped. Other cells:

    python benchmarks/stacked.py --cells losses.objective=hinge "losses.objective=hinge losses.r1=1"

Samples are drawn as a run draws them, of the density that is fitted to its codes; with
`generator.prior=0` in a cell, of the noise of training.

The measure is that of PacGAN (Lin et al., 2018), see `cl_ray/evaluation/modes.py`.
"""

import json
import os
import re
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from pydantic import Field
from rich.console import Console
from rich.table import Table

from cl_ray.base_config import BaseConfig
from cl_ray.cli import parse
from cl_ray.config import Config, build, merge, preset
from cl_ray.data.dataset import STACKED, Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.data.sources import SourceConfig, write_dataset
from cl_ray.device import keep_freed_memory, resolve_device
from cl_ray.errors import UserError
from cl_ray.evaluation.modes import SAMPLES, ModeEvaluator
from cl_ray.evaluation.reference import StackedReference
from cl_ray.model import TrainedModel
from cl_ray.trainer import NonFiniteLossError, StepLog, Trainer

# The exact penalties stand in the place of the approximate one.
CELLS = (
    "losses.objective=non-saturating",
    "losses.objective=relativistic losses.r1=1 losses.r2=1 losses.approximate_r1=0",
)
BASE = {"generator": {"latent": 30}, "checkpoint": {"every": 0}}
"""What all cells share: three digits, so three times the preset's latent dimensions."""


class Command(BaseConfig):
    """Train cells for an equal time on Stacked MNIST, and count the modes of their samples."""

    minutes: float = Field(10, gt=0, description="Of training, for each cell and seed.")
    cells: tuple[str, ...] = Field(
        CELLS, description="Fields and values that each cell changes, separated by spaces."
    )
    seeds: tuple[int, ...] = Field((0,), description="Each cell is trained once with each.")
    out: str = Field("runs/stacked", description="Folder of the results, and of the data.")
    data: str | None = Field(
        None, description=f"Data that `cl-ray data --source {STACKED}` wrote; None makes it."
    )
    samples: int = Field(SAMPLES, ge=1, description="Samples that modes are counted in.")
    threads: int = Field(1, ge=1, description="CPU threads.")


class TimeIsUp(Exception):
    """Ends an epoch."""


class Clock:
    """Counts the seconds of each thread, and ends the epoch when the time is up."""

    def __init__(self, seconds: float):
        self.begun = time.process_time()
        self.allowed, self.seconds, self.images = seconds, 0.0, 0

    def watch(self, record: StepLog) -> None:
        """Take a record in."""
        self.seconds = (time.process_time() - self.begun) / torch.get_num_threads()
        self.images += record.images
        if self.seconds >= self.allowed:
            raise TimeIsUp


def config_of(cell: str, seed: int, data: str) -> Config:
    """The config of a cell."""
    fields: dict[str, Any] = merge(preset("quick").model_dump(), {**BASE, "data": data})
    for pair in [f"seed={seed}", *cell.split()]:
        field, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"{pair!r} of a cell is not a field and its value, as `losses.r1=1`.")
        change: Any = yaml.safe_load(value)
        for name in reversed(field.split(".")):
            change = {name: change}
        fields = merge(fields, change)
    config = build(fields, f"the cell {cell!r}")
    if config.optimizer.decay:
        raise UserError(
            f"optimizer.decay {config.optimizer.decay:g} of the cell {cell!r} is of a run of known "
            "length, and a cell ends when its time is up: leave it 0."
        )
    return config


def trained(config: Config, dataset: Dataset, seconds: float) -> tuple[Trainer, Clock]:
    """A run after so many seconds of steps, overstepped by less than `log_every` steps."""
    device, dtype = resolve_device(config)
    run = Trainer(config, InMemoryLoader.read(Partition(dataset, config), device), device, dtype)
    clock = Clock(seconds)
    try:
        while True:
            run.train_epoch(clock.watch)
    except TimeIsUp:
        run.fit_prior()
        return run, clock


def measure(
    config: Config, dataset: Dataset, command: Command, judge: ModeEvaluator
) -> dict[str, Any]:
    """What a cell is worth."""
    try:
        run, clock = trained(config, dataset, 60 * command.minutes)
    except NonFiniteLossError as error:
        return {"diverged": str(error)}
    gan = run.gan
    loaded = TrainedModel(
        config=config,
        shape=dataset.info.shape,
        checkpoint="ema_generator",
        step=gan.steps,
        generator=gan.ema_generator.eval(),
        discriminator=gan.discriminator.eval(),
        device=gan.device,
        classes=gan.classes,
        counts=tuple(run.shard.partition.counts),
        prior=run.prior,
    )
    return {
        "modes": asdict(judge.measure(loaded.generate(command.samples, seed=1))),
        "steps": gan.steps,
        "seconds": clock.seconds,
        "images_per_second": clock.images / clock.seconds,
        "device": str(loaded.device),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def results(command: Command, console: Console) -> list[tuple[str, int, dict[str, Any]]]:
    """Each cell's name, seed and result; those that are there are read."""
    out = Path(command.out)
    data = command.data or str(out / "data")
    # Every mistake in a cell is said before the first one trains.
    configs = [(c, s, config_of(c, s, data)) for c in command.cells for s in command.seeds]
    if command.data is None and not (out / "data").exists():
        write_dataset(SourceConfig(source=STACKED, out=data))
    dataset = Dataset.open(data)
    judge: ModeEvaluator | None = None
    found = []
    for cell, seed, config in configs:
        name = re.sub(r"[^a-z0-9.]+", "-", cell)
        file = out / f"{name}-seed{seed}-{command.minutes:g}min.json"
        asked = {"config": config.to_yaml(), "samples": command.samples}
        saved = json.loads(file.read_text()) if file.exists() else {}
        if saved.get("asked") != asked:
            console.print(
                f"{cell}, seed {seed}: {command.minutes:g} minutes", highlight=False, soft_wrap=True
            )
            judge = judge or ModeEvaluator(StackedReference())
            saved = {"asked": asked, **measure(config, dataset, command, judge)}
            part = file.with_suffix(".part")
            part.write_text(json.dumps(saved, indent=1))
            os.replace(part, file)
        found.append((cell, seed, saved))
    return found


def main() -> None:
    """Print the table."""
    console = Console()
    try:
        command = parse(Command, sys.argv[1:], prog="python benchmarks/stacked.py")
        torch.set_num_threads(command.threads)
        keep_freed_memory()
        found = results(command, console)
    except UserError as error:
        sys.exit(f"stacked: {error}")
    title = f"{command.minutes:g} minutes each, {command.samples:,} samples"
    table = Table("cell", "seed", "modes", "KL, nats", "steps", "images/s", title=title)
    for cell, seed, result in found:
        if "diverged" in result:
            table.add_row(cell, str(seed), "–", result["diverged"], "–", "–")
            continue
        metrics = result["modes"]["metrics"]
        shown = [f"{metrics['modes']['value']:.0f}", f"{metrics['mode_kl']['value']:.3f}"]
        shown += [f"{result['steps']:,}", f"{result['images_per_second']:.0f}"]
        table.add_row(cell, str(seed), *shown)
        floors = [f"{metrics['modes']['floor']:.0f}", f"{metrics['mode_kl']['floor']:.3f}"]
    if any("modes" in result for _, _, result in found):
        table.add_row("real triples", "", *floors, "", "")
    console.print(table)


if __name__ == "__main__":
    main()
