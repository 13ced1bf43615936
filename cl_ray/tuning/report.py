"""report.html: which balance works, and what mattered; one file that needs no network."""

import base64
import shlex
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from cl_ray.report.chart import count, number
from cl_ray.report.render import render
from cl_ray.report.summary import Stat, roughly
from cl_ray.tuning.importance import RATES, comparable, importances, what_mattered
from cl_ray.tuning.leaderboard import best_trials, rank_trials, short
from cl_ray.tuning.prepare import Search, lacking
from cl_ray.tuning.study import TrialResult

if TYPE_CHECKING:
    from cl_ray.tuning.charts import SearchChart

DEPTHS = ("generator.depth", "discriminator.depth")


@dataclass(frozen=True)
class TrialPicture:
    """What a trial drew: the PNG as a `data:` URI, and what it is."""

    source: str
    title: str


def write_report(search: Search, rows: list[TrialResult]) -> str | None:
    """Write report.html.

    Returns:
        One sentence on what mattered; None where plotly is not there.
    """
    if lacking():
        return None
    metric = search.metrics[0]
    alike, epoch = comparable(rows)
    weights = importances(alike, epoch, metric, search.space)
    sentence = what_mattered(alike, epoch, metric, weights)
    parts: list[list[Any]] = []
    for charts in charts_of(search, rows, alike, epoch, weights):
        first = not any(parts)
        parts.append([(c, c.to_html(first and i == 0)) for i, c in enumerate(charts)])
    context = {
        "name": search.name,
        "folder": str(search.folder),
        "made": f"{datetime.now():%-d %B %Y, %H:%M}",
        "sentence": sentence,
        "tiles": search_stats(search, rows),
        "train": f"cl-ray train --config {shlex.quote(str(search.folder))}/best.yaml",
        "best": best_trials(rows, search.metrics),
        "parts": parts,
        "pictures": trial_pictures(search, rows),
        "table": leaderboard(search, rows),
    }
    page = render("search.html", context, packages=["cl_ray.tuning"])
    search.folder.write("report.html", page.encode())
    return sentence


def charts_of(
    search: Search,
    rows: list[TrialResult],
    alike: list[TrialResult],
    epoch: int,
    weights: dict[str, float],
) -> "list[list[SearchChart]]":
    """How it went, what mattered, and the values against each other.

    Args:
        search: Whose trials they are.
        rows: All trials, by number.
        alike: Those that are compared.
        epoch: After which.
        weights: What each field's share is, where there is one.
    """
    from cl_ray.tuning.charts import bars, grid_of, history, map_of, parallel, pareto

    metric, space = search.metrics[0], search.space
    epochs = search.options.epochs
    went = [history(rows, metric, epochs)] if any(metric.name in r.metrics for r in rows) else []
    went += pareto(rows, search.metrics, epochs)
    values = [parallel(alike, epoch, metric, space)] if len(alike) > 1 else []
    values += [
        chart(alike, epoch, metric, space, *pair)
        for chart, pair in ((map_of, RATES), (grid_of, DEPTHS))
        if sum(all(field in row.values for field in pair) for row in alike) > 1
    ]
    return [went, [bars(weights, epoch)] if weights else [], values]


def search_stats(search: Search, rows: list[TrialResult]) -> list[Stat]:
    """How many trials ended how, the best metrics, and the time."""
    ends = Counter("stopped early" if r.status == "stopped" else r.status for r in rows)
    how = ", ".join(f"{many} {status}" for status, many in ends.items())
    found = [Stat("Trials", str(len(rows)), how)]
    for metric in search.metrics:
        best = best_trials(rows, [metric])
        if best:
            of = f"the best: trial {best.number}, after {count(best.epoch, 'epoch')}"
            found.append(Stat(metric.name, number(best.metrics[metric.name]), of))
    seconds, epochs = sum(row.seconds for row in rows), sum(row.epoch for row in rows)
    found.append(Stat("Training", roughly(seconds), f"{count(epochs, 'epoch')} in all"))
    return found


def trial_pictures(search: Search, rows: list[TrialResult]) -> list[TrialPicture]:
    """What the best and the worst trial make of the same noise, as far as there are pictures."""
    best = best_trials(rows, search.metrics)
    order = [row for row in rank_trials(rows, search.metrics) if row.epoch]
    shown = []
    for name, row in (("best", best), ("worst", order[-1] if len(order) > 1 else None)):
        for epoch in range(row.epoch if row else 0, 0, -1):
            assert row is not None
            file = f"{row.number:04d}/samples/samples-{epoch:04d}.png"
            image = search.trials.read(file)
            if image:
                code = base64.b64encode(image).decode()
                title = f"the {name}, trial {row.number} ({row.status}), after epoch {epoch}"
                shown.append(TrialPicture(f"data:image/png;base64,{code}", title))
                break
    return shown


def leaderboard(
    search: Search, rows: list[TrialResult]
) -> tuple[list[str], list[tuple[bool, list[str]]]]:
    """All trials, the best first: names of columns; whether a row counts, and its cells."""
    fields = list(search.space.parameters)
    names = [m.name for m in search.metrics]
    head = ["trial", "state", "epoch", *names, *map(short, fields), ""]
    lines = []
    for row in rank_trials(rows, search.metrics):
        scores = [number(row.metrics[n]) if n in row.metrics else "–" for n in names]
        values = [row.values.get(field, "–") for field in fields]
        plain = [number(v) if isinstance(v, float) else str(v) for v in values]
        cells = [str(row.number), row.status, str(row.epoch), *scores, *plain, row.reason]
        lines.append((row.counts, cells))
    return head, lines
