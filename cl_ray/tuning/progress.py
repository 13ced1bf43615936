"""What people see of a search that runs: a live table, or readable lines in a log."""

import time
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from cl_ray.training.progress import format_duration, pluralize
from cl_ray.tuning.leaderboard import best_trials, rank_trials, table_of
from cl_ray.tuning.study import SearchMetric, TrialResult

REFRESH = 0.5
"""Seconds between two pictures of the table."""


class SearchProgress:
    """Shows where a search stands.

    Args:
        console: Where to print.
        metrics: What is optimised.
        epochs: Of a whole trial.
        trials: How many there will be.
    """

    def __init__(self, console: Console, metrics: list[SearchMetric], epochs: int, trials: int):
        self.console, self.metrics, self.epochs, self.trials = console, metrics, epochs, trials
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self.begun, self.shown = time.monotonic(), 0.0
        self.before: int | None = None

    def __enter__(self) -> "SearchProgress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def show(self, line: str, rows: list[TrialResult]) -> None:
        """A line that stays, if there is one, and the table."""
        ended = sum(row.status != "running" for row in rows)
        self.before = ended if self.before is None else self.before
        if line and not self.console.is_terminal:
            done = f"[{ended}/{self.trials}] "
            self.console.print(Text(done + line), soft_wrap=True)
        due = time.monotonic() - self.shown > REFRESH
        if self.console.is_terminal and (line or due):
            self.shown = time.monotonic()
            self.live.update(self.picture(rows, ended), refresh=True)

    def picture(self, rows: list[TrialResult], ended: int) -> Any:
        """The table, those that run first, over a line on the whole."""
        running = [row for row in rows if row.status == "running"]
        others = [row for row in rank_trials(rows, self.metrics) if row.status != "running"]
        height = max(4, self.console.height - 4)
        order = [*running, *others]
        table = table_of(order, self.metrics, self.epochs, self.console, height, fold=False)
        best = best_trials(rows, self.metrics)
        parts = [f"{ended}/{pluralize(self.trials, 'trial')}"]
        if best:
            scores = (f"{m.name} {best.metrics[m.name]:.4g}" for m in self.metrics)
            parts.append(f"best: trial {best.number}, {', '.join(scores)}")
        new = ended - (self.before or 0)
        if new:
            each = (time.monotonic() - self.begun) / new
            parts.append(f"about {format_duration(each * (self.trials - ended))} left")
        return Group(table, Text("   ".join(parts), style="bold"))
