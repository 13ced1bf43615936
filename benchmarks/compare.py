"""Train settings for the same time, one thread each, and compare their metrics.

    python benchmarks/compare.py objectives --seconds 100  # every objective with every family
    python benchmarks/compare.py labels --seconds 150      # without labels, with both conditions
    python benchmarks/compare.py stacked --seconds 480     # modes of Stacked MNIST
    python benchmarks/compare.py digits --cells "" "losses.r1=0.05 losses.gradient_penalty=0"

A cell is the quick preset with some fields changed, trained with one seed. `--seconds` counts the
CPU time of the cell's own thread, so other programs on the machine do not change the result;
`--pairs` counts training pairs instead, for cells that share a GPU.

Each row is appended to `--out` as soon as its cell ends, with a digest of the whole config. The
same command resumes with the missing cells and prints the table of its budget. A cell counts as
collapsed if its samples have less than half of the real-data baseline's precision or a tenth of
its coverage, or if the rarest digit is less than a hundredth as frequent as the most common one.
"""

import hashlib
import json
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import cache
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Annotated, Any, Literal

import torch
import tyro
from bare import append_row, build_evaluator, build_trainer, cell_config, train_until
from rich.console import Console

from cl_ray.config import Config
from cl_ray.data.dataset import STACKED
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset
from cl_ray.device import describe_device, keep_freed_memory, resolve_device
from cl_ray.evaluation.evaluate import MODE_SAMPLES, Evaluator, ModeEvaluator
from cl_ray.evaluation.reference import StackedReference
from cl_ray.losses.adversarial import OBJECTIVES
from cl_ray.model import TrainedModel
from cl_ray.networks.build import FAMILIES
from cl_ray.step_log import NonFiniteLossError, StepLog
from cl_ray.trainer import Trainer

PENALTIES = {"relativistic": "losses.r1=0.05 losses.r2=0.05 losses.gradient_penalty=0"}
"""The penalties of an objective's own paper; the others keep the default's."""
FAMILY_RATES = {"residual": "optimizer.lr_g=0.005 optimizer.lr_d=0.0025"}
"""In runs this short the residual family stays black at the preset's rates."""
TABLES = {
    "objectives": [
        f"losses.objective={objective} generator.family={family} discriminator.family={family} "
        f"{PENALTIES.get(objective, '')} {FAMILY_RATES.get(family, '')}".strip()
        for objective, family in product(OBJECTIVES, FAMILIES)
    ],
    "labels": [f"condition={condition}" for condition in ("none", "classifier", "projection")],
    "digits": [""],
    # Three digits need three times the preset's latent dimensions.
    "stacked": [
        "generator.latent=30",
        "generator.latent=30 losses.objective=relativistic losses.r1=1 losses.r2=1 "
        "losses.gradient_penalty=0",
    ],
}
COLUMNS = {
    "stacked": ["modes", "mode_kl"],
    "digits": [
        "frechet_over_baseline", "precision", "recall", "coverage", "label_balance",
        "linear_probe", "knn_1", "class_accuracy",
    ],
}  # fmt: skip

Row = dict[str, Any]


def config_digest(config: Config) -> str:
    """Hash all that decides what the networks become."""
    fields = config.model_dump(exclude={"device", "checkpoint", "evaluation"})
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:8]


def train(config: Config, seconds: float | None, pairs: int | None) -> tuple[Trainer, float, str]:
    """Train until the budget is spent.

    Returns:
        The trainer, the CPU seconds of this thread, and the error that ended it early, if any.
    """
    trainer = build_trainer(config)
    began = time.process_time()

    def is_spent(log: StepLog) -> bool:
        if pairs:
            return log.step * config.batch_size >= pairs
        return seconds is not None and time.process_time() - began >= seconds

    error = ""
    try:
        train_until(trainer, is_spent)
    except NonFiniteLossError as failure:
        error = str(failure)
    return trainer, time.process_time() - began, error


@cache
def digit_evaluator() -> Evaluator:
    """Build this process's evaluator of digits once."""
    return build_evaluator()


@cache
def mode_evaluator() -> ModeEvaluator:
    """Build this process's counter of modes once."""
    return ModeEvaluator(StackedReference(), "validation")


def measure(trainer: Trainer, table: str) -> Row:
    """Measure the networks, and whether they have collapsed."""
    model = TrainedModel.from_trainer(trainer)
    if table == "stacked":
        counted = mode_evaluator().measure(model.generate(MODE_SAMPLES, seed=1)).metrics
        metrics = {name: metric.value for name, metric in counted.items()}
        collapsed = metrics["modes"] < counted["modes"].real_baseline / 2
    else:
        evaluation = digit_evaluator().evaluate(model)
        assert evaluation.fidelity is not None
        metrics = evaluation.metrics()
        fidelity = evaluation.fidelity.metrics
        baselines = {name: metric.real_baseline for name, metric in fidelity.items()}
        collapsed = (
            metrics["precision"] < baselines["precision"] / 2
            or metrics["coverage"] < baselines["coverage"] / 10
            or metrics["label_balance"] < 0.01
        )
    return {"metrics": {n: round(v, 5) for n, v in metrics.items()}, "collapsed": bool(collapsed)}


def run_cell(
    cell: str, table: str, config: Config, seconds: float | None, pairs: int | None
) -> Row:
    torch.set_num_threads(1)
    keep_freed_memory()
    trainer, spent, error = train(config, seconds, pairs)
    steps = trainer.gan.steps
    row: Row = {
        "table": table, "cell": cell, "config": config_digest(config), "seed": config.seed,
        "seconds": seconds, "budget_pairs": pairs, "spent": round(spent, 1), "steps": steps,
        "pairs": steps * config.batch_size, "ended": error, "collapsed": False,
        "on": describe_device(*resolve_device(config.device, config.precision)),
    }  # fmt: skip
    return row if error else row | measure(trainer, table)


def print_table(table: str, rows: list[Row], console: Console) -> None:
    """Print Markdown: means over seeds with their standard deviation."""
    columns = COLUMNS.get(table, COLUMNS["digits"])
    columns = [n for n in columns if any(n in row.get("metrics", {}) for row in rows)]
    console.print(f"| {table} | seeds | steps | " + " | ".join(columns) + " | ended well |")
    console.print("|---" * (len(columns) + 4) + "|")
    for cell in dict.fromkeys(row["cell"] for row in rows):
        of = [row for row in rows if row["cell"] == cell]
        texts = [cell or "preset", str(len(of)), str(round(mean(row["steps"] for row in of)))]
        for name in columns:
            values = [row["metrics"][name] for row in of if name in row.get("metrics", {})]
            spread = f" ± {stdev(values):.3g}" if len(values) > 1 else ""
            texts.append(f"{mean(values):.4g}{spread}" if values else "–")
        bad = {row["ended"] or "collapsed" for row in of if row["ended"] or row["collapsed"]}
        console.print("| " + " | ".join([*texts, ", ".join(sorted(bad)) or "yes"]) + " |")


def main(
    table: Annotated[Literal["objectives", "labels", "digits", "stacked"], tyro.conf.Positional],
    seconds: float = 120.0,
    pairs: int | None = None,
    seeds: int = 1,
    cells: tuple[str, ...] = (),
    device: Literal["cpu", "cuda"] = "cpu",
    processes: int = 1,
    out: Path = Path("runs/compare.jsonl"),
) -> None:
    """Train and measure the missing cells, then print the table.

    Args:
        table: Which cells and which metrics.
        seconds: Training of each cell, in CPU seconds of its thread.
        pairs: Training of each cell in pairs, instead of seconds.
        seeds: Seeds of each cell, from 0.
        cells: Other cells than the table's: fields and values, separated by spaces.
        device: Where cells are trained; `cuda` needs `--pairs`, as its threads only wait.
        processes: Cells at once.
        out: JSON Lines file of the rows.
    """
    console = Console(soft_wrap=True, highlight=False)
    if device == "cuda" and not pairs:
        raise SystemExit("--device cuda needs a budget of --pairs.")
    budget = (None, pairs) if pairs else (seconds, None)
    fields: dict[str, Any] = {"device": device, "log_every": 10}
    if table == "stacked":
        fields["data"] = str(out.parent / "stacked-mnist")
        if not Path(fields["data"]).exists():
            write_dataset(SourceConfig(source=STACKED, out=fields["data"]))
    wanted = {
        config_digest(config): (cell, config)
        for cell, seed in product(cells or TABLES[table], range(seeds))
        for config in [cell_config(cell, seed=seed, **fields)]
    }
    rows: list[Row] = []
    if out.exists():
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        rows = [r for r in rows if r["config"] in wanted]
        rows = [r for r in rows if (r["seconds"], r["budget_pairs"]) == budget]
    known = {row["config"] for row in rows}
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        pending = [
            pool.submit(run_cell, cell, table, config, *budget)
            for digest, (cell, config) in wanted.items()
            if digest not in known
        ]
        for future in as_completed(pending):
            rows.append(future.result())
            append_row(out, rows[-1])
            console.print(rows[-1])
    print_table(table, rows, console)


if __name__ == "__main__":
    tyro.cli(main)
