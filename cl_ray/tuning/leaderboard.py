"""The ranking of trials, the files and tables that show it, and the live table."""

import csv
import io
import json
import time
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cl_ray.config import Config
from cl_ray.storage import RunStorage
from cl_ray.training.progress import format_duration, pluralize
from cl_ray.tuning.space import Values, apply_values
from cl_ray.tuning.study import SearchMetric, TrialResult

_UNRANKED = {"running": 1, "collapsed": 2, "diverged": 2, "failed": 3}
"""The order, after the ranked trials, of those whose metrics cannot be ranked."""
_REFRESH_INTERVAL = 0.5
"""Seconds between two pictures of the live table."""


def rank_trials(results: list[TrialResult], metrics: list[SearchMetric]) -> list[TrialResult]:
    """Return the best first: by the metric, or by the Pareto front, then the mean rank."""
    ranked = [result for result in results if result.is_valid]
    if len(metrics) > 1:
        front = {result.number for result in pareto_front(ranked, metrics)}
        ranks = {result.number: 0 for result in ranked}
        for metric in metrics:
            for rank, result in enumerate(sorted(ranked, key=lambda r: metric_cost(r, metric))):
                ranks[result.number] += rank
        ranked.sort(key=lambda r: (r.number not in front, ranks[r.number], r.number))
    else:
        ranked.sort(key=lambda r: (metric_cost(r, metrics[0]), r.number))
    unranked = [result for result in results if not result.is_valid]
    return ranked + sorted(unranked, key=lambda r: (_UNRANKED[r.status], r.number))


def best_trial(results: list[TrialResult], metrics: list[SearchMetric]) -> TrialResult | None:
    """Return the best of the finished trials, else of all that can be ranked."""
    finished = [result for result in results if result.status == "finished"]
    order = rank_trials(finished or [r for r in results if r.is_valid], metrics)
    return order[0] if order else None


def pareto_front(results: list[TrialResult], metrics: list[SearchMetric]) -> list[TrialResult]:
    """Return the trials for which no other is better in one metric and as good in all."""

    def dominated(result: TrialResult) -> bool:
        own = [metric_cost(result, m) for m in metrics]
        for other in results:
            costs = [metric_cost(other, m) for m in metrics]
            if costs != own and all(c <= o for c, o in zip(costs, own, strict=True)):
                return True
        return False

    return [result for result in results if not dominated(result)]


def metric_cost(result: TrialResult, metric: SearchMetric) -> float:
    """Return the trial's metric, negated where larger is better."""
    value = result.metrics.get(metric.name, metric.worst)
    return -value if metric.maximize else value


def write_leaderboard(
    folder: RunStorage, results: list[TrialResult], metrics: list[SearchMetric], base: Config
) -> None:
    """Write leaderboard.csv, leaderboard.json, and best.yaml: `base` with the best values."""
    ranked = rank_trials(results, metrics)
    front = {r.number for r in pareto_front([r for r in results if r.is_valid], metrics)}
    rows: list[dict[str, Any]] = [
        {"place": place, "trial": r.number, "front": r.number in front, **r.to_dict()}
        for place, r in enumerate(ranked, 1)
    ]
    folder.write("leaderboard.json", json.dumps(rows, indent=1).encode())
    fields = dict.fromkeys(field for row in rows for field in row["values"])
    names = dict.fromkeys(
        [*(m.name for m in metrics), *(name for row in rows for name in row["metrics"])]
    )
    columns = ["place", "trial", "status", "epoch", "seconds", *names, *fields, "reason"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="", extrasaction="ignore")
    table.writeheader()
    table.writerows({**row, **row["metrics"], **row["values"]} for row in rows)
    folder.write("leaderboard.csv", text.getvalue().encode())
    best = best_trial(results, metrics)
    if best:
        folder.write("best.yaml", _best_yaml(best, metrics, base, folder.name).encode())


def _best_yaml(result: TrialResult, metrics: list[SearchMetric], base: Config, search: str) -> str:
    """Return the config of a trial as `cl-ray train --config` takes it."""
    config = apply_values(base, result.values).model_dump(mode="json", exclude={"name", "storage"})
    scores = ", ".join(f"{m.name} {result.metrics[m.name]:.5g}" for m in metrics)
    return (
        f"# Trial {result.number} of the search {search}, after {result.epoch} epochs: {scores}.\n"
        f"{yaml.safe_dump(config, sort_keys=False)}"
    )


def leaderboard_table(
    ranked: list[TrialResult],
    metrics: list[SearchMetric],
    epochs: int,
    console: Console,
    max_rows: int = 20,
    wrap: bool = True,
) -> Table:
    """Return a table of the first trials, with a column for each searched field.

    Where the console is too narrow for that, all values are in one column, on several lines, or
    left out if not `wrap`.
    """
    shown = ranked[:max_rows]
    fields = list(dict.fromkeys(field for result in ranked for field in result.values))
    cells = [[_format(result.values.get(field, "–")) for field in fields] for result in shown]
    table = _table(shown, metrics, epochs, [short_name(field) for field in fields], cells)
    unlimited = console.options.update(max_width=10_000)
    if Measurement.get(console, unlimited, table).maximum <= console.width:
        return table
    if not wrap:
        return _table(shown, metrics, epochs, [], [[] for _ in shown])
    table = _table(shown, metrics, epochs, [""], [[format_values(r.values)] for r in shown])
    table.columns[-1].justify = "left"
    return table


def _table(
    results: list[TrialResult],
    metrics: list[SearchMetric],
    epochs: int,
    headings: list[str],
    cells: list[list[str]],
) -> Table:
    """Return a table of the trials, with their `cells` under the `headings`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("trial", "state", "epoch", *(m.name for m in metrics)):
        table.add_column(heading, justify="right" if heading != "state" else "left", no_wrap=True)
    for heading in headings:
        table.add_column(heading, justify="right")
    for result, values in zip(results, cells, strict=True):
        scores = [
            f"{result.metrics[m.name]:.4g}" if m.name in result.metrics else "–" for m in metrics
        ]
        style = "" if result.is_valid else "dim" if result.status != "running" else "cyan"
        place = f"{result.epoch}/{epochs}"
        table.add_row(str(result.number), result.status, place, *scores, *values, style=style)
    return table


def format_values(values: Values) -> str:
    """Return searched values in one line."""
    return "  ".join(f"{short_name(field)} {_format(value)}" for field, value in values.items())


def short_name(field: str) -> str:
    """Return a field's name as tables show it: `discriminator.depth` is `D depth`."""
    section, _, name = field.rpartition(".")
    return f"{ {'generator': 'G ', 'discriminator': 'D '}.get(section, '') }{name}"


def _format(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class SearchProgress:
    """Shows a running search: a live table in a terminal, lines elsewhere."""

    def __init__(self, console: Console, metrics: list[SearchMetric], epochs: int, trials: int):
        self.console, self.metrics, self.epochs, self.trials = console, metrics, epochs, trials
        self.live = Live(console=console, auto_refresh=False, transient=True)
        self._start, self._last_refresh = time.monotonic(), 0.0
        self._ended_before: int | None = None

    def __enter__(self) -> "SearchProgress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def show(self, line: str, results: list[TrialResult]) -> None:
        """Print a line, if there is one, or update the table."""
        ended = sum(result.status != "running" for result in results)
        self._ended_before = ended if self._ended_before is None else self._ended_before
        if not self.console.is_terminal:
            if line:
                self.console.print(Text(f"[{ended}/{self.trials}] {line}"), soft_wrap=True)
        elif line or time.monotonic() - self._last_refresh > _REFRESH_INTERVAL:
            self._last_refresh = time.monotonic()
            self.live.update(self._render(results, ended), refresh=True)

    def _render(self, results: list[TrialResult], ended: int) -> Group:
        """Return the table, running trials first, over a line on the whole search."""
        running = [r for r in results if r.status == "running"]
        ranked = [r for r in rank_trials(results, self.metrics) if r.status != "running"]
        height = max(4, self.console.height - 4)
        table = leaderboard_table(
            [*running, *ranked], self.metrics, self.epochs, self.console, height, wrap=False
        )
        parts = [f"{ended}/{pluralize(self.trials, 'trial')}"]
        best = best_trial(results, self.metrics)
        if best:
            scores = (f"{m.name} {best.metrics[m.name]:.4g}" for m in self.metrics)
            parts.append(f"best: trial {best.number}, {', '.join(scores)}")
        new = ended - (self._ended_before or 0)
        if new:
            seconds = (time.monotonic() - self._start) / new * (self.trials - ended)
            parts.append(f"about {format_duration(seconds)} left")
        return Group(table, Text("   ".join(parts), style="bold"))
