"""Training that a search needs to reach what random search without early stopping reaches.

`python benchmarks/spent.py` replays searches over the recorded curves in `pool.jsonl`, with the
project's own samplers, schedulers and study; only the training is looked up. For each seed 24
random settings are trained to their end, and a search runs until one of its trials has, after any
epoch, a metric as good as the best of those.

- The pool has 109 settings of `pool_space.yaml`, each trained for 6 epochs of 1,024 digits on one
  thread: the two that a search tries first, and 107 random ones. `frechet` is the distance of
  1,000 samples from as many test digits.
- What TPE proposes is rounded to the nearest setting of the pool that was not tried (learning rates
  by their logarithm), and TPE is told that setting: it never hears of a metric that its values do
  not have. Rounding over eleven fields is coarse and holds TPE back.
- Two trials run at once, each as fast as it was. An epoch counts when it starts.
- A search that has tried the whole pool in vain counts as endless.
"""

import heapq
import json
import math
import random
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cl_ray.config import Config, build_config, merge, preset
from cl_ray.tuning.runner import build_scheduler
from cl_ray.tuning.space import Parameter, Space, Values
from cl_ray.tuning.study import SearchMetric, TrialResult, build_sampler, finish_trial

POOL = Path(__file__).parent / "pool.jsonl"
METRIC = SearchMetric("frechet", maximize=False)
INITIAL, EPOCHS = 2, 6
"""Settings of the pool that a search tries first, and epochs of each."""
SEEDS, TRIALS, CONCURRENT = 50, 24, 2
THEN: dict[str, Any] = {
    "optimizer": {"lr_g": 1e-3, "lr_d": 1e-3},
    "losses": {"reconstruction": 40.0},
    "generator": {"latent_noise_std": 0.7, "prior": 0},
}
"""The preset `quick` when the pool was recorded, where it differs from today's."""


@dataclass(frozen=True)
class Curve:
    """A setting of the pool.

    Args:
        values: The setting.
        frechet: The distance after each epoch.
        seconds: CPU seconds of each epoch, that in which it diverged among them.
        diverged: Why it was not trained further; empty if it was.
    """

    values: Values
    frechet: list[float]
    seconds: list[float]
    diverged: str


@dataclass(frozen=True)
class Strategy:
    """A way to search.

    Args:
        name: Its name in the table.
        sampler: What proposes settings.
        scheduler: What stops trials early.
        initial: Whether it starts with the settings known to work, as a search does.
    """

    name: str
    sampler: str
    scheduler: str
    initial: bool = False


STRATEGIES = [
    Strategy("TPE, ASHA, initial settings first (the default)", "tpe", "asha", initial=True),
    Strategy("TPE, ASHA", "tpe", "asha"),
    Strategy("random, ASHA", "random", "asha"),
    Strategy("TPE, no early stopping", "tpe", "none"),
    Strategy("random, no early stopping", "random", "none"),
]


@dataclass
class Cost:
    """Training: epochs, and the CPU seconds that they took."""

    epochs: float = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Count an epoch."""
        self.epochs, self.seconds = self.epochs + 1, self.seconds + seconds


def random_search(curves: list[Curve], seed: int) -> tuple[float, Cost]:
    """Return the best distance that 24 random settings reach after any epoch, and their cost."""
    cost, best = Cost(), math.inf
    for curve in random.Random(seed).sample(curves, TRIALS):
        for seconds in curve.seconds:
            cost.add(seconds)
        best = min([best, *curve.frechet])
    return best, cost


@dataclass
class Trial:
    """A setting that is trained; Ray Tune's schedulers need only its `trial_id`.

    Args:
        recorded: The study's trial.
        curve: What it reaches.
        epoch: Finished epochs.
    """

    recorded: optuna.Trial
    curve: Curve
    epoch: int = 0

    @property
    def trial_id(self) -> str:
        """Its name for Ray Tune."""
        return str(self.recorded.number)

    @property
    def score(self) -> float:
        """The distance after the last epoch; the worst if it diverged in it."""
        distances = self.curve.frechet
        return distances[self.epoch - 1] if self.epoch <= len(distances) else METRIC.worst


@dataclass
class Replay:
    """A search over the pool.

    Args:
        strategy: How it searches.
        base: The config that the settings change.
        space: The space that they are from.
        curves: The random settings.
        initial: The settings that it starts with, if it does.
        seed: Seed of the search.
    """

    strategy: Strategy
    base: Config
    space: Space
    curves: list[Curve]
    initial: list[Curve]
    seed: int
    cost: Cost = field(default_factory=Cost)
    running: list[tuple[float, int, Trial]] = field(default_factory=list)
    """The time when an epoch ends, the soonest first."""

    def __post_init__(self) -> None:
        self.first = list(self.initial) if self.strategy.initial else []
        self.left = random.Random(SEEDS + self.seed).sample(self.curves, len(self.curves))
        sampler = build_sampler(self.strategy.sampler, self.seed, TRIALS)
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        self.scheduler = build_scheduler(
            self.strategy.scheduler, METRIC, EPOCHS, self.space, self.seed, []
        )

    def cost_of(self, target: float) -> Cost:
        """Return what it costs until a trial is as good as `target`."""
        now = 0.0
        while self.running or self.first or self.left:
            while len(self.running) < CONCURRENT and (self.first or self.left):
                trial = self.propose()
                self.scheduler.on_trial_add(None, trial)
                self.train(trial, now)
            now, _, trial = heapq.heappop(self.running)
            trial.epoch += 1
            if trial.score <= target:
                return self.cost
            if self.continues(trial):
                self.train(trial, now)
        return Cost(math.inf, math.inf)

    def propose(self) -> Trial:
        """Return the next setting, which the study then has."""
        if self.first:
            curve = self.first.pop(0)
        elif self.strategy.sampler == "random":
            curve = self.left.pop()
        else:
            asked = self.study.ask()
            proposed = self.space.suggest(asked, self.base)
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)  # TPE ignores it
            curve = min(self.left, key=lambda c: squared_distance(self.space, proposed, c.values))
            self.left.remove(curve)
        self.study.enqueue_trial(curve.values)
        recorded = self.study.ask()
        assert self.space.suggest(recorded, self.base) == curve.values
        return Trial(recorded, curve)

    def train(self, trial: Trial, now: float) -> None:
        """Start an epoch."""
        seconds = trial.curve.seconds[trial.epoch]
        self.cost.add(seconds)
        heapq.heappush(self.running, (now + seconds, trial.recorded.number, trial))

    def continues(self, trial: Trial) -> bool:
        """Report an epoch to the study and the scheduler; return whether the trial continues."""
        result = {"epoch": trial.epoch, METRIC.name: trial.score}
        ended = trial.epoch == len(trial.curve.seconds)
        diverged = ended and bool(trial.curve.diverged)
        if not diverged:
            trial.recorded.report(trial.score, trial.epoch)
        if ended:
            self.scheduler.on_trial_complete(None, trial, result)
        elif self.scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE:
            return True
        status = "diverged" if diverged else "finished" if ended else "stopped"
        number, metrics = trial.recorded.number, {METRIC.name: trial.score}
        outcome = TrialResult(number, status, trial.curve.values, metrics)
        finish_trial(self.study, trial.recorded, outcome, [METRIC])
        return False


def squared_distance(space: Space, one: Values, other: Values) -> float:
    """Return how far two settings are apart, with every field's range scaled to 1."""
    fields = space.parameters.items()
    return sum((position(p, one[f]) - position(p, other[f])) ** 2 for f, p in fields)


def position(parameter: Parameter, value: Any) -> float:
    """Return where in its range a value is, 0 to 1; choices, all numbers here, by their order."""
    bounds = parameter.bounds()
    if parameter.kind == "choice":
        return bounds.index(value) / max(len(bounds) - 1, 1)
    low, high, value = (
        math.log(v) if parameter.kind == "log" else v for v in (bounds[0], bounds[-1], value)
    )
    return float((value - low) / (high - low))


def main() -> None:
    """Print the table."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    base = build_config(merge(preset("quick").model_dump(), {"epochs": EPOCHS, **THEN}))
    space = Space.load(str(POOL.with_name("pool_space.yaml")))
    rows = sorted(map(json.loads, POOL.read_text().splitlines()), key=lambda row: row["number"])
    names = ("values", "frechet", "seconds", "diverged")
    pool = [Curve(**{name: row.get(name, "") for name in names}) for row in rows]
    initial, curves = pool[:INITIAL], pool[INITIAL:]
    table = Table(
        *("search", "epochs", "CPU seconds", "of 5 seeds", "cheaper in"),
        title=f"Training, of what {TRIALS} random settings cost: {len(curves)} settings of up to "
        f"{EPOCHS} epochs; {SEEDS} seeds",
        caption="median (quartiles); the median of seeds 0 to 4, epochs; share of seeds",
    )
    for strategy in STRATEGIES:
        ratios: dict[str, list[float]] = {"epochs": [], "seconds": []}
        for seed in range(SEEDS):
            target, theirs = random_search(curves, seed)
            ours = Replay(strategy, base, space, curves, initial, seed).cost_of(target)
            ratios["epochs"].append(ours.epochs / theirs.epochs)
            ratios["seconds"].append(ours.seconds / theirs.seconds)
        cells = []
        for values in ratios.values():
            low, middle, high = statistics.quantiles(values, n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        cheaper = sum(ratio < 1 for ratio in ratios["epochs"]) / SEEDS
        five = statistics.median(ratios["epochs"][:5])
        table.add_row(strategy.name, *cells, f"{five:.2f}", f"{cheaper:.0%}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
