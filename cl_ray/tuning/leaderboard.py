"""The ranking of trials, the files and tables that show it, and the live table."""

import csv
import io
import json
import math
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

import yaml
from rich.console import Console, Group
from rich.live import Live
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from cl_ray.console import print_line
from cl_ray.data.partition import TRAIN_SPLIT
from cl_ray.errors import format_duration, pluralize, printable
from cl_ray.tuning.search import Search
from cl_ray.tuning.space import Values, apply_values
from cl_ray.tuning.study import SearchMetric, TrialResult

_UNRANKED = {"running": 1, "waiting": 2, "collapsed": 3, "diverged": 3, "failed": 4}
"""The order, after the ranked trials, of those whose metrics cannot be ranked."""
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")
_REFRESH_INTERVAL = 0.5
"""Seconds between two pictures of the live table."""


def rank_trials(results: list[TrialResult], metrics: list[SearchMetric]) -> list[TrialResult]:
    """Return the best first: by the metric, or the Pareto front, then others by the mean rank.

    Finished trials are before others, whose metrics are of fewer epochs. The front and the ranks of
    several metrics are those of the finished trials, if there are any.
    """
    valid = [result for result in results if result.is_valid]

    def order_by_metric(result: TrialResult) -> tuple[bool, bool, float, int]:
        cost = metric_cost(result, metrics[0])
        return cost == math.inf, result.status != "finished", cost, result.number

    ranked = sorted(valid, key=order_by_metric)
    if len(metrics) > 1:
        front = {result.number for result in search_front(results, metrics)}
        ranks = {result.number: 0 for result in _candidates(results)}
        for metric in metrics:
            order = sorted(_candidates(results), key=lambda r: metric_cost(r, metric))
            for rank, result in enumerate(order):
                ranks[result.number] += rank
        worst = len(valid) * len(metrics)
        ranked.sort(key=lambda r: (r.number not in front, ranks.get(r.number, worst), r.number))
    unranked = [result for result in results if not result.is_valid]
    return ranked + sorted(unranked, key=lambda r: (_UNRANKED[r.status], r.number))


def best_trial(results: list[TrialResult], metrics: list[SearchMetric]) -> TrialResult | None:
    """Return the best of the finished trials, else of all that can be ranked."""
    order = rank_trials(_candidates(results), metrics)
    return order[0] if search_front(order[:1], metrics) else None


def describe_best(results: list[TrialResult], metrics: list[SearchMetric]) -> str:
    """Return a sentence on the best trial, its metrics and why it is the best, if there is one."""
    best = best_trial(results, metrics)
    if best is None:
        return ""
    scores = ", ".join(f"{m.name} {best.metrics[m.name]:.5g}" for m in metrics)
    pool = pluralize(len(_candidates(results)), f"{best.status} trial")
    if len(metrics) > 1:
        front = len(search_front(results, metrics))
        pool = (
            f"{pluralize(front, 'trial')} of the Pareto front, by the mean of its ranks among "
            f"{pool}"
        )
    after = pluralize(best.epoch, "epoch")
    return f"Trial {best.number} is the best of {pool}: {scores} after {after}."


def _candidates(results: list[TrialResult]) -> list[TrialResult]:
    """Return the finished trials, else all that can be ranked."""
    finished = [result for result in results if result.status == "finished"]
    return finished or [result for result in results if result.is_valid]


def search_front(results: list[TrialResult], metrics: list[SearchMetric]) -> list[TrialResult]:
    """Return the Pareto front of the finished trials, else of all that can be ranked.

    A trial is on it that has all metrics, and no other is better in one and as good in all.
    """
    costs = {r.number: [metric_cost(r, m) for m in metrics] for r in _candidates(results)}

    def dominated(own: list[float]) -> bool:
        others = (other for other in costs.values() if other != own)
        return any(all(c <= o for c, o in zip(other, own, strict=True)) for other in others)

    return [
        result
        for result in _candidates(results)
        if math.inf not in costs[result.number] and not dominated(costs[result.number])
    ]


def metric_cost(result: TrialResult, metric: SearchMetric) -> float:
    """Return the trial's metric, negated where larger is better; of NaN, Inf or none it is inf."""
    value = result.metrics.get(metric.name, math.nan)
    if not math.isfinite(value):
        return math.inf
    return -value if metric.maximize else value


def write_leaderboard(search: Search, results: list[TrialResult]) -> None:
    """Write leaderboard.csv, leaderboard.json, and best.yaml: the config with the best values."""
    folder, metrics = search.folder, search.metrics
    ranked = rank_trials(results, metrics)
    front = {result.number for result in search_front(results, metrics)}
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
    table = csv.DictWriter(text, columns)
    table.writeheader()
    for row in rows:
        cells = {**row, **row["metrics"], **row["values"]}
        table.writerow({column: _csv_cell(cells.get(column, "")) for column in columns})
    folder.write("leaderboard.csv", text.getvalue().encode())
    best = best_trial(results, metrics)
    if best:
        folder.write("best.yaml", _best_yaml(search, results, best).encode())


def _csv_cell(value: Any) -> Any:
    """Return a cell that no spreadsheet takes for a formula, as it does text that starts so."""
    if not isinstance(value, str):
        return value
    return f"'{printable(value)}" if value.startswith(_FORMULA_STARTS) else printable(value)


def _best_yaml(search: Search, results: list[TrialResult], best: TrialResult) -> str:
    """Return the config of a trial as `cl-ray train --config` takes it."""
    config = apply_values(search.config, best.values)
    fields = config.model_dump(mode="json", exclude={"name", "storage"})
    images = search.dataset.info.splits[TRAIN_SPLIT].rows
    evaluation = search.trial_config.evaluation
    exchanged = (
        f"# These are its last values; weights that it copied were trained with others: they are "
        f"in trials/{best.number:04d}.\n"
        if search.options.scheduler == "pbt"
        else ""
    )
    return (
        f"# Search {search.name}. {describe_best(results, search.metrics)}\n{exchanged}"
        f"# An epoch was {images:,} training images; metrics are of at most {evaluation.samples:,} "
        f"samples and as many real images, probes of at most {evaluation.images:,} training ones.\n"
        f"{yaml.safe_dump(fields, sort_keys=False)}"
    )


def leaderboard_table(
    ranked: list[TrialResult],
    metrics: list[SearchMetric],
    epochs: int,
    console: Console,
    max_rows: int = 20,
) -> Table:
    """Return a table of the first trials, a line each, with the searched fields that differ.

    Where the console is too narrow, the last fields are left out. A star marks the Pareto front of
    several metrics.
    """
    shown = ranked[:max_rows]
    front = search_front(ranked, metrics) if len(metrics) > 1 else []
    fields = [
        field
        for field in dict.fromkeys(field for result in ranked for field in result.values)
        if len(ranked) == 1 or len({repr(result.values.get(field)) for result in ranked}) > 1
    ]
    unlimited = console.options.update(max_width=10_000)
    table = Table()
    for count in range(len(fields), -1, -1):
        table = Table(box=None, pad_edge=False, header_style="bold")
        names = [metric.name for metric in metrics]
        for heading in ("trial", "state", "epoch", *names, *map(short_name, fields[:count])):
            table.add_column(heading, justify="left" if heading == "state" else "right")
        for result in shown:
            style = "" if result.is_valid else "cyan" if result.status == "running" else "dim"
            scores = (result.metrics.get(name) for name in names)
            table.add_row(
                f"{'*' if result in front else ''}{result.number}",
                result.status,
                f"{result.epoch}/{epochs}",
                *("–" if score is None else f"{score:.4g}" for score in scores),
                *(_format(result.values.get(field, "–")) for field in fields[:count]),
                style=style,
            )
        if Measurement.get(console, unlimited, table).maximum <= console.width:
            break
    return table


def format_values(values: Values) -> str:
    """Return searched values in one line."""
    return "  ".join(f"{short_name(field)} {_format(value)}" for field, value in values.items())


def short_names(fields: Iterable[str]) -> dict[str, str]:
    """Return the short name of each field; those that would share one keep their dotted names."""
    names = {field: short_name(field) for field in fields}
    counts = Counter(names.values())
    return {field: name if counts[name] == 1 else field for field, name in names.items()}


def short_name(field: str) -> str:
    """Return a field's name as tables show it: `discriminator.depth` is `D depth`."""
    section, _, name = field.rpartition(".")
    return f"{ {'generator': 'G ', 'discriminator': 'D '}.get(section, '') }{name}"


def _format(value: Any) -> str:
    """Return a value in few characters."""
    if not isinstance(value, float):
        return str(value)
    text = f"{value:g}"
    return text if len(text) <= 6 else f"{value:.3g}"


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
        ended = sum(result.has_ended for result in results)
        self._ended_before = ended if self._ended_before is None else self._ended_before
        if not self.console.is_terminal:
            if line:
                print_line(self.console, f"[{ended}/{self.trials}] {line}")
        elif line or time.monotonic() - self._last_refresh > _REFRESH_INTERVAL:
            self._last_refresh = time.monotonic()
            self.live.update(self._render(results, ended), refresh=True)

    def _render(self, results: list[TrialResult], ended: int) -> Group:
        """Return the table, running trials first, over a line on the whole search."""
        order = sorted(rank_trials(results, self.metrics), key=lambda result: result.has_ended)
        height = max(4, self.console.height - 4)  # below the headings
        table = leaderboard_table(order, self.metrics, self.epochs, self.console, height)
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
