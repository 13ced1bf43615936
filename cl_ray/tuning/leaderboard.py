"""Who is best: the order of trials, the tables that are written, and best.yaml."""

import csv
import io
import json
from typing import Any

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from cl_ray.config import Config
from cl_ray.storage import RunStorage
from cl_ray.tuning.space import Values, configured
from cl_ray.tuning.study import SearchMetric, TrialResult

LAST = {"running": 1, "collapsed": 2, "diverged": 2, "failed": 3}
"""Trials whose metrics do not count come after those that do, in this order."""


def rank_trials(rows: list[TrialResult], metrics: list[SearchMetric]) -> list[TrialResult]:
    """The best first: by the figure, or by the front and then the mean rank of several."""
    counted = [row for row in rows if row.counts]
    if len(metrics) > 1:
        best = {row.number for row in pareto_front(counted, metrics)}
        places = {row.number: 0 for row in counted}
        for metric in metrics:
            for place, row in enumerate(sorted(counted, key=lambda r: cost(r, metric))):
                places[row.number] += place
        counted.sort(key=lambda r: (r.number not in best, places[r.number], r.number))
    else:
        counted.sort(key=lambda r: (cost(r, metrics[0]), r.number))
    others = [row for row in rows if not row.counts]
    return counted + sorted(others, key=lambda r: (LAST[r.status], r.number))


def best_trials(rows: list[TrialResult], metrics: list[SearchMetric]) -> TrialResult | None:
    """The best of the trials that ran to their end, else of all that count."""
    whole = [row for row in rows if row.status == "finished"]
    order = rank_trials(whole or [row for row in rows if row.counts], metrics)
    return order[0] if order else None


def pareto_front(rows: list[TrialResult], metrics: list[SearchMetric]) -> list[TrialResult]:
    """Those that no other is better than in one metric and as good in all (Pareto)."""

    def dominated(row: TrialResult) -> bool:
        mine = [cost(row, m) for m in metrics]
        for other in rows:
            theirs = [cost(other, m) for m in metrics]
            if theirs != mine and all(t <= m for t, m in zip(theirs, mine, strict=True)):
                return True
        return False

    return [row for row in rows if not dominated(row)]


def cost(row: TrialResult, metric: SearchMetric) -> float:
    """The metric's figure, turned so that smaller is better."""
    value = row.metrics.get(metric.name, metric.worst)
    return -value if metric.larger else value


def write_leaderboard(
    folder: RunStorage, rows: list[TrialResult], metrics: list[SearchMetric], base: Config
) -> None:
    """Put leaderboard.csv, leaderboard.json and best.yaml in place.

    Args:
        folder: The search's.
        rows: All trials.
        metrics: What is optimised.
        base: What `cl-ray train` is to start from, without the search's own economies.
    """
    order = rank_trials(rows, metrics)
    best = {row.number for row in pareto_front([r for r in rows if r.counts], metrics)}
    plain: list[dict[str, Any]] = []
    for place, row in enumerate(order, 1):
        kept = {k: v for k, v in row.__dict__.items() if k != "number"}
        plain.append({"place": place, "trial": row.number, "front": row.number in best, **kept})
    folder.write("leaderboard.json", json.dumps(plain, indent=1).encode())
    fields = list(dict.fromkeys(field for row in order for field in row.values))
    measured = list(dict.fromkeys(name for row in order for name in row.metrics))
    names = [m.name for m in metrics]
    measured = names + [name for name in measured if name not in names]
    columns = ["place", "trial", "status", "epoch", "seconds", *measured, *fields, "reason"]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="")
    table.writeheader()
    for place, row in enumerate(order, 1):
        line = {k: getattr(row, k) for k in ("status", "epoch", "seconds", "reason")}
        table.writerow({"place": place, "trial": row.number, **line, **row.metrics, **row.values})
    folder.write("leaderboard.csv", text.getvalue().encode())
    chosen = best_trials(rows, metrics)
    if chosen:
        folder.write("best.yaml", best_yaml(chosen, metrics, base, folder.name).encode())


def best_yaml(row: TrialResult, metrics: list[SearchMetric], base: Config, search: str) -> str:
    """The config of a trial as `cl-ray train --config` takes it."""
    config = configured(base, row.values).model_dump(mode="json", exclude={"name", "storage"})
    scores = ", ".join(f"{m.name} {row.metrics[m.name]:.5g}" for m in metrics)
    import yaml

    return (
        f"# Trial {row.number} of the search {search}, after {row.epoch} epochs: {scores}.\n"
        f"{yaml.safe_dump(config, sort_keys=False)}"
    )


def table_of(
    rows: list[TrialResult],
    metrics: list[SearchMetric],
    epochs: int,
    console: Console,
    most: int = 20,
    fold: bool = True,
) -> Table:
    """The first of `rows`, as people read them; `rows` are in order.

    Where a column for each field has no room, all values stand in one, on several lines, or else
    (`fold` false, where a row is to be one line) are left out.
    """
    shown = rows[:most]
    fields = list(dict.fromkeys(field for row in rows for field in row.values))
    apart = [[_plain(row.values.get(field, "–")) for field in fields] for row in shown]
    table = _scores_of(shown, metrics, epochs, [short(field) for field in fields], apart)
    anywhere = console.options.update(max_width=10_000)
    if Measurement.get(console, anywhere, table).maximum <= console.width:
        return table
    if not fold:
        return _scores_of(shown, metrics, epochs, [], [[] for _ in shown])
    table = _scores_of(shown, metrics, epochs, [""], [[format_values(row.values)] for row in shown])
    table.columns[-1].justify = "left"
    return table


def _scores_of(
    rows: list[TrialResult],
    metrics: list[SearchMetric],
    epochs: int,
    fields: list[str],
    values: list[list[str]],
) -> Table:
    """A line for each row, with its `values` under the headings `fields`."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("trial", "state", "epoch", *(m.name for m in metrics)):
        table.add_column(heading, justify="right" if heading != "state" else "left", no_wrap=True)
    for field in fields:
        table.add_column(field, justify="right")
    for row, mine in zip(rows, values, strict=True):
        scores = [f"{row.metrics[m.name]:.4g}" if m.name in row.metrics else "–" for m in metrics]
        style = "" if row.counts else "dim" if row.status != "running" else "cyan"
        epoch = f"{row.epoch}/{epochs}"
        table.add_row(str(row.number), row.status, epoch, *scores, *mine, style=style)
    return table


def format_values(values: Values) -> str:
    """Searched values in one line."""
    return "  ".join(f"{short(field)} {_plain(value)}" for field, value in values.items())


def short(field: str) -> str:
    """A field's name as tables have it: `discriminator.depth` is `D depth`."""
    room, _, name = field.rpartition(".")
    return f"{ {'generator': 'G ', 'discriminator': 'D '}.get(room, '') }{name}"


def _plain(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
