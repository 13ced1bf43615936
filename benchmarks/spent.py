"""Training that a search spends to reach what random search without stopping reaches.

`python benchmarks/spent.py` replays searches over the recorded curves of `pool.py`, with the
project's own samplers, schedulers and bookkeeping, and Ray Tune's successive halving; only the
training is looked up. For every seed 24 random settings are trained to their end, and a search
goes on until one of its trials has, after any pass, a figure as good as the best of those.

- What TPE proposes is rounded to the nearest setting of the pool that was not tried (evenly over
  the space, learning rates by magnitude), and TPE is told that setting: it never hears of a
  figure that its values do not have. Rounding over eleven fields is coarse and holds TPE back.
- Two trials are under way at once, each as fast as it was. A pass counts when it begins.
- A search that has tried the whole pool in vain counts as endless.
"""

import heapq
import math
import random
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from pool import EPOCHS, IMAGES, KNOWN, METRIC, Curve, read, task
from ray.tune.schedulers import TrialScheduler
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cl_ray.tuning.schedulers import build_scheduler
from cl_ray.tuning.space import Parameter, Space, Values
from cl_ray.tuning.study import TrialResult, build_sampler, finish_trial

SEEDS, TRIALS, AT_ONCE = 50, 24, 2


@dataclass(frozen=True)
class Kind:
    """A way to search.

    Args:
        name: What the table calls it.
        sampler: Who proposes.
        scheduler: Who stops early.
        known: Whether it begins with the settings known to work, as a search does.
    """

    name: str
    sampler: str
    scheduler: str
    known: bool = False


KINDS = [
    Kind("TPE, halving (the default)", "tpe", "asha"),
    Kind("the same, known settings first", "tpe", "asha", known=True),
    Kind("chance, halving", "random", "asha"),
    Kind("TPE, no stopping", "tpe", "none"),
    Kind("chance, no stopping", "random", "none"),
]


@dataclass
class Spent:
    """Training: passes, and the CPU seconds that they took."""

    passes: int = 0
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """A pass."""
        self.passes, self.seconds = self.passes + 1, self.seconds + seconds


def at_random(curves: list[Curve], seed: int) -> tuple[float, Spent]:
    """The best that 24 random settings reach after any pass, and what they cost."""
    spent, best = Spent(), float("inf")
    for curve in random.Random(seed).sample(curves, TRIALS):
        for seconds in curve.seconds:
            spent.add(seconds)
        best = min([best, *curve.frechet])
    return best, spent


@dataclass
class Trial:
    """A setting that is trained; Ray Tune's schedulers ask for no more than a `trial_id`.

    Args:
        own: The study's.
        curve: What it will reach.
        epoch: Passes that are over.
    """

    own: optuna.Trial
    curve: Curve
    epoch: int = 0

    @property
    def trial_id(self) -> str:
        """For Ray Tune."""
        return str(self.own.number)

    @property
    def figure(self) -> float:
        """After the last pass; one that diverged in it scores worst."""
        metrics = self.curve.frechet
        return metrics[self.epoch - 1] if self.epoch <= len(metrics) else METRIC.worst


@dataclass
class Replay:
    """A search over the pool.

    Args:
        kind: How it searches.
        curves: The random settings.
        known: Those that it begins with, if it does.
        seed: Of what it draws.
    """

    kind: Kind
    curves: list[Curve]
    known: list[Curve]
    seed: int
    spent: Spent = field(default_factory=Spent)
    under_way: list[tuple[float, int, Trial]] = field(default_factory=list)
    """When the pass will be over; the soonest first."""

    def __post_init__(self) -> None:
        self.base, self.space = task()
        self.first = list(self.known) if self.kind.known else []
        self.left = random.Random(SEEDS + self.seed).sample(self.curves, len(self.curves))
        sampler = build_sampler(self.kind.sampler, self.seed, TRIALS)
        self.study = optuna.create_study(direction="minimize", sampler=sampler)
        self.scheduler = build_scheduler(
            self.kind.scheduler, METRIC, EPOCHS, self.space, self.seed, []
        )

    def spends(self, target: float) -> Spent:
        """What it costs until a trial is as good as `target`."""
        now = 0.0
        while self.under_way or self.first or self.left:
            while len(self.under_way) < AT_ONCE and (self.first or self.left):
                trial = self.propose()
                self.scheduler.on_trial_add(None, trial)
                self.train(trial, now)
            now, _, trial = heapq.heappop(self.under_way)
            trial.epoch += 1
            if trial.figure <= target:
                return self.spent
            if self.goes_on(trial):
                self.train(trial, now)
        return Spent(sys.maxsize, float("inf"))

    def propose(self) -> Trial:
        """The next setting, as the study will know it."""
        if self.first:
            curve = self.first.pop(0)
        elif self.kind.sampler == "random":
            curve = self.left.pop()
        else:
            asked = self.study.ask()
            wanted = self.space.suggest(asked, self.base)
            self.study.tell(asked, state=optuna.trial.TrialState.FAIL)  # says nothing to TPE
            curve = min(self.left, key=lambda c: apart(self.space, wanted, c.values))
            self.left.remove(curve)
        self.study.enqueue_trial(curve.values)
        own = self.study.ask()
        assert self.space.suggest(own, self.base) == curve.values
        return Trial(own, curve)

    def train(self, trial: Trial, now: float) -> None:
        """Begin a pass."""
        seconds = trial.curve.seconds[trial.epoch]
        self.spent.add(seconds)
        heapq.heappush(self.under_way, (now + seconds, trial.own.number, trial))

    def goes_on(self, trial: Trial) -> bool:
        """Hear of a pass, as Ray Tune, the scheduler and the recorder do."""
        result = {"epoch": trial.epoch, METRIC.name: trial.figure}
        over = trial.epoch == len(trial.curve.seconds)
        diverged = over and bool(trial.curve.diverged)
        if not diverged:
            trial.own.report(trial.figure, trial.epoch)
        if over:
            self.scheduler.on_trial_complete(None, trial, result)
        elif self.scheduler.on_trial_result(None, trial, result) == TrialScheduler.CONTINUE:
            return True
        status = "diverged" if diverged else "finished" if over else "stopped"
        row = TrialResult(trial.own.number, status, trial.curve.values, {METRIC.name: trial.figure})
        finish_trial(self.study, trial.own, row, [METRIC])
        return False


def apart(space: Space, one: Values, other: Values) -> float:
    """How far two settings are from each other, every field's range being 1 wide."""
    fields = space.parameters.items()
    return sum((place(p, one[f]) - place(p, other[f])) ** 2 for f, p in fields)


def place(parameter: Parameter, value: Any) -> float:
    """Where in its range a value lies, 0 to 1; choices, which are numbers here, by their order."""
    ends = parameter.ends()
    if parameter.kind == "choice":
        return ends.index(value) / max(len(ends) - 1, 1)
    low, high, value = (
        math.log(v) if parameter.kind == "log" else v for v in (ends[0], ends[-1], value)
    )
    return float((value - low) / (high - low))


def main() -> None:
    """Print the table."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    pool = read()
    known, curves = pool[:KNOWN], pool[KNOWN:]
    best = min(figure for curve in curves for figure in curve.frechet)
    table = Table(
        *("search", "passes", "CPU seconds", "of 5 seeds", "cheaper in"),
        title=f"Spent, of what {TRIALS} random settings cost: {len(curves)} settings of up to "
        f"{EPOCHS} passes over {IMAGES} digits, the best {best:.2f}; {SEEDS} seeds",
        caption="median (quartiles); the median of seeds 0 to 4, passes; share of seeds",
    )
    for kind in KINDS:
        ratios: dict[str, list[float]] = {"passes": [], "seconds": []}
        for seed in range(SEEDS):
            target, theirs = at_random(curves, seed)
            ours = Replay(kind, curves, known, seed).spends(target)
            ratios["passes"].append(ours.passes / theirs.passes)
            ratios["seconds"].append(ours.seconds / theirs.seconds)
        cells = []
        for some in ratios.values():
            low, middle, high = statistics.quantiles(some, n=4)
            cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
        cheaper = sum(ratio < 1 for ratio in ratios["passes"]) / SEEDS
        five = statistics.median(ratios["passes"][:5])
        table.add_row(kind.name, *cells, f"{five:.2f}", f"{cheaper:.0%}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
