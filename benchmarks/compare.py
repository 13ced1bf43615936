"""Settings side by side on real digits: each trained for the same time, then measured alike.

    python benchmarks/compare.py objectives            # every objective by every family of networks
    python benchmarks/compare.py forms --seeds 3       # contrastive term: off, InfoNCE, ContraD's
    python benchmarks/compare.py tricks                # penalties, averaging, falling rates, latent_noise_std
    python benchmarks/compare.py sizes                 # D smaller than, equal to and larger than G
    python benchmarks/compare.py labels                # conditions; these features are supervised
    python benchmarks/compare.py found                 # the quick preset, and what searches found
    python benchmarks/compare.py searched --seeds 3    # each objective by settings of its own
    python benchmarks/compare.py objectives --pairs 128000 --device cuda --processes 8

A cell is one setting with one seed, trained on one thread for `--seconds` of that thread's own
time, so that what else runs on the machine costs it nothing; or for so many `--pairs`, which is
what several cells can share a GPU by. Its metrics go into benchmarks/results/TABLE.jsonl as it
ends, and the same command goes on with the cells that are missing there; the table of that budget
is printed at the end. With them stands a digest of the whole config: a row of another one than the
setting has now, for the preset may have changed, counts as missing and is not shown, and one that
another table has counts as there. Collapsed is a
cell whose samples have half of the precision or a tenth of the coverage that the test digits have
of training digits, or whose rarest digit is one in a hundred of its commonest. Samples are drawn as
a run draws them, of the density that is fitted to its codes.
"""

import hashlib
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console

from cl_ray.config import Config, build, merge, preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import describe_device, keep_freed_memory, resolve_device
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.losses.adversarial import OBJECTIVES
from cl_ray.model import TrainedModel
from cl_ray.networks.build import FAMILIES
from cl_ray.trainer import Trainer

RESULTS = Path(__file__).parent / "results"
PENALTIES: dict[str, dict[str, float]] = {
    "wasserstein": {"gradient_penalty": 10.0},
    "relativistic": {"r1": 0.05, "r2": 0.05, "approximate_r1": 0.0},
}
"""What an objective's own paper adds; the others keep the default's approximate R1."""
RATES = {"residual": {"lr_g": 0.001, "lr_d": 0.0003}}
"""Of a family: with the preset's, which were searched for convolutions, or with a D as fast as G,
some objectives stay black in the residual one."""
CHECKED_EVERY = 20
MEASURED = EvaluationConfig(samples=5000, images=10_000)
SHOWN = ["frechet_over_floor", "precision", "recall", "coverage", "label_balance"]
SHOWN += ["linear_probe", "knn_1", "class_accuracy"]

Fields = dict[str, Any]


def objectives() -> dict[str, Fields]:
    """Every objective by every family, G and D of the same one."""
    return {
        f"{objective}, {family}": {
            "losses": {"objective": objective, **PENALTIES.get(objective, {})},
            "generator": {"family": family},
            "discriminator": {"family": family},
            "optimizer": RATES.get(family, {}),
        }
        for objective, family in product(OBJECTIVES, FAMILIES)
    }


def forms() -> dict[str, Fields]:
    """D with and without what it learns from views."""
    views = {"rotate": 20.0, "shift": 0.12, "scale": 0.2, "shear": 15.0, "warp": 0.1, "erase": 0.15}
    contrad = {"form": "contrad", "pair": 0.0, "approximate_r1": 0.0, "temperature": 0.1}
    off = {"contrastive": 0.0, "pair": 0.0, "pair_confusion": 0.0}
    return {
        "without": {"losses": off},
        "InfoNCE": {},
        "ContraD": {"losses": contrad, "augment": views},
        "InfoNCE, D sees views": {"augment": {"shift": 0.12}},
        "InfoNCE, hard negatives": {"pairs": {"negatives": "hard", "candidates": 4}},
    }


def tricks() -> dict[str, Fields]:
    """The preset, and what it would be with one thing more or one less."""
    exact = {"approximate_r1": 0.0, "r1": 0.05}
    return {
        "preset": {},
        "no slope penalty": {"losses": {"approximate_r1": 0.0}},
        "R1 exact": {"losses": exact},
        "R1 and R2 exact": {"losses": {**exact, "r2": 0.05}},
        "gradient penalty 1": {"losses": {"approximate_r1": 0.0, "gradient_penalty": 1.0}},
        "spectral norm": {
            "losses": {"approximate_r1": 0.0},
            "discriminator": {"spectral_norm": True},
        },
        "two steps of D": {"optimizer": {"d_steps": 2}},
        "rates fall over the second half": {"optimizer": {"decay": 0.5}},
        "G not averaged": {"optimizer": {"average": 0.0}},
        "no latent_noise_std": {"generator": {"latent_noise_std": 0.0}},
        "latent vectors not spread": {"losses": {"uniformity": 0.0}},
        "no pair term": {"losses": {"pair": 0.0, "pair_confusion": 0.0}},
    }


def sizes() -> dict[str, Fields]:
    """Widths of G by widths of D."""
    return {
        f"G {g}, D {d}": {"generator": {"width": g}, "discriminator": {"width": d}}
        for g, d in product((16, 32, 64), (16, 32, 64))
    }


def labels() -> dict[str, Fields]:
    """Without labels, and by both conditions."""
    return {name: {"condition": name} for name in ("none", "classifier", "projection")}


def found() -> dict[str, Fields]:
    """The quick preset beside settings that searches led to, most with the latent_noise_std of their time."""

    def setting(
        lr_g: float,
        lr_d: float,
        depth: tuple[int, int] = (3, 3),
        width: int = 32,
        latent_noise_std: float = 0.7,
        **others: Any,
    ) -> Fields:
        return {
            "optimizer": {"lr_g": lr_g, "lr_d": lr_d, "d_steps": others.pop("d_steps", 1)},
            "generator": {"depth": depth[0], "width": width, "latent_noise_std": latent_noise_std},
            "discriminator": {"depth": depth[1], "width": width},
            **others,
        }

    def weights(reconstruction: float, slope: float) -> Fields:
        return {"reconstruction": reconstruction, "approximate_r1": slope}

    return {
        "preset": {},
        "preset until then": setting(0.001, 0.001, losses=weights(40, 0.05)),
        "latent_noise_std 0.35": setting(0.003, 0.002, latent_noise_std=0.35, losses=weights(60, 0.05)),
        "latent_noise_std 0.4, slower D": setting(0.003, 0.0015, latent_noise_std=0.4, losses=weights(50, 0.1)),
        "latent_noise_std 0.1": setting(0.003, 0.002, latent_noise_std=0.1, losses=weights(60, 0.05)),
        "latent_noise_std 0": setting(0.003, 0.002, latent_noise_std=0.0, losses=weights(60, 0.05)),
        "trial 8": setting(
            0.0028, 0.0005, (4, 5), width=48, d_steps=2, batch_size=32,
            losses={"contrastive": 3.18, "reconstruction": 56.3},
        ),
        "trial 5": setting(
            0.00067, 0.00086, (4, 4), width=48, d_steps=2, batch_size=32,
            losses={"contrastive": 0.163, "reconstruction": 23.8},
        ),
        "batches of 32, slower D": setting(
            0.0012, 0.0004, batch_size=32, losses=weights(40, 0.05)
        ),
        "deeper": setting(0.001, 0.001, (4, 4), losses=weights(40, 0.05)),
    }  # fmt: skip


def searched() -> dict[str, Fields]:
    """Every objective by the best settings of its own search, `settings.py`."""
    table: dict[str, Fields] = {}
    for line in (RESULTS / "settings.jsonl").read_text().splitlines():
        row = json.loads(line)
        objective, best = row["objective"], row["trials"][0]
        fields: Fields = {"losses": {"objective": objective, **PENALTIES.get(objective, {})}}
        fields["generator"] = {"latent_noise_std": row["latent_noise_std"]}
        for name, value in best.items():
            section, dot, field = name.partition(".")
            if dot:
                fields.setdefault(section, {})[field] = value
        table[objective] = fields
    return table


TABLES = {
    "objectives": objectives,
    "forms": forms,
    "tricks": tricks,
    "sizes": sizes,
    "labels": labels,
    "found": found,
    "searched": searched,
}


@dataclass(frozen=True)
class Budget:
    """How long a cell is trained: `seconds` of its own thread, or else `pairs`."""

    seconds: float | None
    pairs: int | None

    def used(self, spent: float, pairs: int) -> float:
        """Which share of it is."""
        return spent / self.seconds if self.seconds else pairs / (self.pairs or 1)

    @classmethod
    def of(cls, cell: Fields) -> "Budget":
        """That of a row."""
        return cls(cell.get("seconds"), cell.get("budget_pairs"))


def train(config: Config, budget: Budget) -> tuple[Trainer, float, str]:
    """A run at the end of its budget, the seconds of this thread, and what ended it early."""
    device, dtype = resolve_device(config)
    shard = InMemoryLoader.read(Partition(Dataset.open(config.data), config), device)
    run = Trainer(config, shard, device, dtype)
    begun = time.process_time()
    pending: list[dict[str, torch.Tensor]] = []
    falling, used = config.optimizer.decay, 0.0
    epoch = 0
    while True:
        for batch in run.shard.batches(epoch):
            if falling:
                run.gan.set_lr_scale(min(1.0, (1 - used) / falling))
            pending.append(run.gan.step(batch))
            spent = time.process_time() - begun
            used = budget.used(spent, run.gan.steps * config.batch_size)
            over = used >= 1
            if over or len(pending) == CHECKED_EVERY:
                lost = [n for t in pending for n, v in t.items() if not v.isfinite()]
                pending.clear()
                if lost or over:
                    run.fit_prior()
                    return run, spent, f"{lost[0]} is no number" if lost else ""
        epoch += 1


def measure(run: Trainer, evaluator: Evaluator) -> Fields:
    """Metrics of the run's networks, and whether they have collapsed."""
    gan = run.gan
    loaded = TrainedModel(
        config=run.config,
        shape=gan.shape,
        checkpoint="",
        step=gan.steps,
        generator=gan.ema_generator,
        discriminator=gan.discriminator,
        device=gan.device,
        classes=gan.classes,
        counts=tuple(run.shard.partition.counts),
        prior=run.prior,
    )
    found = evaluator.evaluate(loaded)
    assert found.fidelity is not None
    floors = {name: figure.floor for name, figure in found.fidelity.metrics.items()}
    metrics = found.metrics()
    collapsed = (
        metrics["precision"] < floors["precision"] / 2
        or metrics["coverage"] < floors["coverage"] / 10
        or metrics["label_balance"] < 0.01
    )
    return {"metrics": {n: round(v, 5) for n, v in metrics.items()}, "collapsed": collapsed}


def configured(fields: Fields, **others: Any) -> Config:
    """The quick preset with a setting's fields."""
    return build(merge(preset("quick").model_dump(), {**fields, **others}))


def digest(fields: Fields) -> str:
    """Of all that decides what a setting's networks become, the seed apart."""
    plain = configured(fields).model_dump(exclude={"seed", "device", "checkpoint", "evaluation"})
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()[:8]


def cells(table: str) -> list[Fields]:
    """What is known so far, of whichever table, of this table's settings as they are now."""
    files = sorted(RESULTS.glob("*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    now = {name: digest(fields) for name, fields in TABLES[table]().items()}
    return [
        {**row, "cell": name}
        for name, config in now.items()
        for row in rows
        if row.get("config") == config
    ]


def show(table: str, budget: Budget, console: Console) -> None:
    """The cells of that budget as Markdown: means over seeds, with their spread."""
    done = [cell for cell in cells(table) if Budget.of(cell) == budget]
    names = [n for n in SHOWN if any(n in cell.get("metrics", {}) for cell in done)]
    console.print(f"| {table} | seeds | steps | " + " | ".join(names) + " | ended well |")
    console.print("|---" * (len(names) + 4) + "|")
    for name in dict.fromkeys(cell["cell"] for cell in done):
        of = [cell for cell in done if cell["cell"] == name]
        row = [name, str(len(of)), str(round(mean(cell["steps"] for cell in of)))]
        for figure in names:
            values = [c["metrics"][figure] for c in of if figure in c.get("metrics", {})]
            spread = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
            row.append(f"{mean(values):.4g}{spread}" if values else "–")
        bad = {cell["ended"] or "collapsed" for cell in of if cell["ended"] or cell["collapsed"]}
        console.print("| " + " | ".join([*row, ", ".join(sorted(bad)) or "yes"]) + " |")


@cache
def evaluator() -> Evaluator:
    """This process's own."""
    return Evaluator(Dataset.open("mnist"), MEASURED)


def fill(name: str, seed: int, fields: Fields, budget: Budget, device: str) -> Fields:
    """One cell: trained and measured."""
    torch.set_num_threads(1)
    keep_freed_memory()
    config = configured(fields, seed=seed, device=device)
    run, spent, ended = train(config, budget)
    cell: Fields = {"cell": name, "config": digest(fields), "seed": seed}
    cell |= {"seconds": budget.seconds}
    cell |= {"budget_pairs": budget.pairs, "spent": round(spent, 1), "steps": run.gan.steps}
    cell |= {"pairs": run.gan.steps * config.batch_size, "ended": ended, "collapsed": False}
    cell |= {"on": describe_device(*resolve_device(config))}
    return cell if ended else cell | measure(run, evaluator())


def main(
    table: Annotated[
        Literal["objectives", "forms", "tricks", "sizes", "labels", "found", "searched"],
        tyro.conf.Positional,
    ],
    seconds: float = 120.0,
    pairs: int | None = None,
    seeds: int = 1,
    only: tuple[str, ...] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    processes: int = 1,
) -> None:
    """Train and measure the cells that are missing, then print the table.

    Args:
        table: What is compared.
        seconds: Training of each cell, in seconds of its one thread.
        pairs: Training of each cell in pairs, in place of seconds.
        seeds: Cells of each setting.
        only: Settings by name; none is all.
        device: Where cells are trained; seconds mean nothing on a GPU, which a thread waits for.
        processes: Cells at once.
    """
    console = Console(soft_wrap=True, highlight=False)
    if device == "cuda" and not pairs:
        console.print("--device cuda needs a budget of --pairs.")
        raise SystemExit(2)
    RESULTS.mkdir(exist_ok=True)
    budget = Budget(None, pairs) if pairs else Budget(seconds, None)
    there = {(c["cell"], c["seed"]) for c in cells(table) if Budget.of(c) == budget}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        under_way = [
            pool.submit(fill, name, seed, fields, budget, device)
            for seed in range(seeds)
            for name, fields in TABLES[table]().items()
            if (name, seed) not in there and (not only or name in only)
        ]
        for done in as_completed(under_way):
            cell = done.result()
            with (RESULTS / f"{table}.jsonl").open("a") as file:
                file.write(json.dumps(cell) + "\n")
            console.print(f"{cell['cell']}, seed {cell['seed']}: {cell}")
    show(table, budget, console)


if __name__ == "__main__":
    tyro.cli(main)
