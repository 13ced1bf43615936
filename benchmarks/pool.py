"""Real settings of the space that is searched and their curves, from which `spent.py` replays.

    python benchmarks/pool.py record 0 2 & python benchmarks/pool.py record 1 2    # two processes
    python benchmarks/pool.py show                         # which balance works, of what they found

A scaled-down task: passes over 1,024 digits, so that a setting takes half a minute of a thread.
Numbers 0 and 1 are the settings that a search tried first, the others drawn at random from all of
what tuning/space.py searched then, pool_space.yaml. Each is trained alike, by the project's own
code in this process, and measured after each pass. A line of pool.jsonl is a setting; what is there
already is not trained again.
"""

import argparse
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import optuna
import torch
from bare import passes
from rich.console import Console
from rich.table import Table

from cl_ray.config import Config, build_config, leaves, merge, preset
from cl_ray.data.dataset import Dataset, RowBatch, sample_rows
from cl_ray.device import keep_freed_memory
from cl_ray.evaluation.fidelity import frechet_distance
from cl_ray.evaluation.probes import nearest_neighbours
from cl_ray.evaluation.reference import ReferenceClassifier
from cl_ray.model import TrainedModel
from cl_ray.step_log import NonFiniteLossError

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cl_ray.tuning.charts import DEPTHS
from cl_ray.tuning.importance import RATES, importance_summary, parameter_importances
from cl_ray.tuning.leaderboard import short_name
from cl_ray.tuning.search import subset_dataset
from cl_ray.tuning.space import Space, Values, apply_values
from cl_ray.tuning.study import SearchMetric, SeededRandomSampler, TrialResult

FILE = Path(__file__).parent / "pool.jsonl"
SPACE = str(FILE.with_name("pool_space.yaml"))
METRIC = SearchMetric("frechet", maximize=False)
KNOWN, RANDOM, SEED = 2, 107, 0
EPOCHS, IMAGES, MEASURED = 6, 1024, 1000
BINS = (1e-4, 2.5e-4, 6.3e-4, 1.6e-3, 4e-3)
"""Ends of the bins of learning rates, evenly apart by magnitude."""


@dataclass(frozen=True)
class Curve:
    """What a setting reached.

    Args:
        number: Its place in the pool.
        values: The setting.
        frechet: The distance after each pass, 1,000 samples against as many test digits.
        knn_1: Of D's features, 1,000 test digits by the 1,024 training digits.
        seconds: CPU seconds of each pass, that in which it diverged among them.
        diverged: Why it was not trained further; empty if it was.
    """

    number: int
    values: Values
    frechet: list[float]
    knn_1: list[float]
    seconds: list[float]
    diverged: str = ""

    @property
    def row(self) -> TrialResult:
        """As a trial of a search."""
        status = "diverged" if self.diverged else "finished"
        history = dict(enumerate(self.frechet, 1))
        return TrialResult(self.number, status, self.values, epoch=len(history), history=history)


def task() -> tuple[Config, Space]:
    """What the settings change, and the space they are from, as both were when it was recorded."""
    then = {
        "optimizer": {"lr_g": 1e-3, "lr_d": 1e-3},
        "losses": {"reconstruction": 40.0},
        "generator": {"latent_noise_std": 0.7, "prior": 0},
    }
    base = merge(preset("quick").model_dump(), {"epochs": EPOCHS, "threads": 1, **then})
    return build_config(base), Space.load(SPACE)


def read() -> list[Curve]:
    """The pool as it stands, by number."""
    lines = FILE.read_text().splitlines() if FILE.exists() else []
    return sorted((Curve(**json.loads(line)) for line in lines), key=lambda c: c.number)


class Measure:
    """How good networks are, briefly."""

    def __init__(self, dataset: Dataset):
        self.reference = ReferenceClassifier.load("mnist")
        self.bank: RowBatch = dataset.read("train")
        self.test = sample_rows(dataset, "test", MEASURED, SEED)
        self.real = self.reference.features(self.test.image)

    def __call__(self, run: TrainedModel) -> tuple[float, float]:
        """The Fréchet distance of its samples, and 1-NN of its features."""
        distance = frechet_distance(self.real, self.reference.features(run.generate(MEASURED)))
        bank, asked = (run.embed(rows.image) for rows in (self.bank, self.test))
        assert self.bank.label is not None
        assert self.test.label is not None
        found = self.bank.label[nearest_neighbours(bank, asked, 1)[:, 0]]
        return distance, float((found == self.test.label).mean())


def record(part: int, parts: int) -> None:
    """Train every `parts`-th setting from number `part` on that is not in the pool."""
    torch.set_num_threads(1)
    keep_freed_memory()
    dataset = subset_dataset(Dataset.open("mnist"), IMAGES)
    base, space = task()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=SeededRandomSampler(SEED))
    own = dict(leaves(base.model_dump()))
    for rate in (own["optimizer.lr_g"], 4e-4):
        first = {field: own[field] for field in space.parameters}
        study.enqueue_trial({**first, "optimizer.lr_g": rate, "optimizer.lr_d": rate})
    settings = [space.suggest(study.ask(), base) for _ in range(KNOWN + RANDOM)]
    measure = Measure(dataset)
    done = {curve.number for curve in read()}
    for number in range(part, len(settings), parts):
        if number in done:
            continue
        curve = Curve(number, settings[number], [], [], [])
        reason = ""
        begun = time.process_time()
        try:
            for run in passes(apply_values(base, settings[number]), dataset):
                curve.seconds.append(round(time.process_time() - begun, 3))
                distance, right = measure(run)
                curve.frechet.append(round(distance, 4))
                curve.knn_1.append(right)
                begun = time.process_time()
        except NonFiniteLossError as error:
            curve.seconds.append(round(time.process_time() - begun, 3))
            reason = str(error)
        with FILE.open("a") as lines:
            lines.write(json.dumps({**asdict(curve), "diverged": reason}) + "\n")
        print(number, curve.frechet, curve.knn_1[-1:], curve.seconds, reason, flush=True)


def show(console: Console) -> None:
    """What mattered, and two maps of the random settings."""
    _, space = task()
    drawn = [curve for curve in read() if curve.number >= KNOWN]
    rows = [curve.row for curve in drawn if not curve.diverged]
    console.print(f"{len(drawn)} settings, of which {len(drawn) - len(rows)} diverged.")
    weights = parameter_importances(rows, EPOCHS, METRIC, space)
    console.print(importance_summary(rows, EPOCHS, METRIC, weights))
    console.print(", ".join(f"{short_name(field)} {weight:.0%}" for field, weight in weights.items()))
    console.print(map_of(rows, *RATES, rate_bin))
    console.print(map_of(rows, *DEPTHS, int))


def rate_bin(rate: float) -> int:
    """Which of `BINS` a learning rate lies in."""
    return sum(rate >= end for end in BINS[1:-1])


def cells_of(
    rows: list[TrialResult], across: str, up: str, bin_of: Any
) -> dict[tuple[int, int], list[float]]:
    """The distances after the last pass of the settings in each bin of two fields."""
    cells: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        place = bin_of(row.values[across]), bin_of(row.values[up])
        cells.setdefault(place, []).append(row.history[EPOCHS])
    return cells


def map_of(rows: list[TrialResult], across: str, up: str, bin_of: Any) -> Table:
    """The median distance after the last pass of the settings in each bin of two fields."""
    cells = cells_of(rows, across, up, bin_of)
    columns, lines = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    names = (
        {n: f"{BINS[n]:.2g} to {BINS[n + 1]:.2g}" for n in range(len(BINS) - 1)}
        if across in RATES
        else {n: str(n) for n in {*columns, *lines}}
    )
    table = Table(f"{short_name(up)} \\ {short_name(across)}", *(names[column] for column in columns))
    for line in lines:
        some = [sorted(cells.get((column, line), [])) for column in columns]
        words = [f"{statistics.median(s):.1f} ({s[0]:.1f}; {len(s)})" if s else "–" for s in some]
        table.add_row(names[line], *words)
    table.caption = "median (best; settings)"
    return table


def main() -> None:
    """Record or show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("verb", choices=("record", "show"))
    parser.add_argument("part", type=int, nargs="?", default=0)
    parser.add_argument("parts", type=int, nargs="?", default=1)
    asked = parser.parse_args()
    if asked.verb == "record":
        record(asked.part, asked.parts)
    else:
        show(Console(width=120, highlight=False))


if __name__ == "__main__":
    main()
