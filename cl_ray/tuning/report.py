"""The report of a search: which values work, and what the metric depends on, as one page."""

import shlex
from collections import Counter
from typing import Any

from cl_ray.errors import format_duration, pluralize
from cl_ray.report.charts import format_number
from cl_ray.report.images import png_uri
from cl_ray.report.page import render_page, write_page
from cl_ray.report.summary import Stat
from cl_ray.tuning import leaderboard
from cl_ray.tuning.charts import history_charts, importance_chart, value_charts
from cl_ray.tuning.importance import comparable_trials, importance_summary, parameter_importances
from cl_ray.tuning.search import Search
from cl_ray.tuning.study import TrialResult


def write_report(search: Search, results: list[TrialResult]) -> str:
    """Write report.html into the search's folder; return a sentence on the importances."""
    metric = search.metrics[0]
    # An enqueued trial may have values that the space has not, of which Optuna takes none.
    inside = [result for result in results if search.space.contains(result.values)]
    comparable, epoch = comparable_trials(inside)
    if search.options.scheduler == "pbt":
        importances = {}
        sentence = "Importances are not estimated: trials of a population exchange their weights."
    else:
        importances = parameter_importances(comparable, epoch, metric, search.space)
        sentence = importance_summary(comparable, epoch, metric, importances)
    importance = [importance_chart(comparable, epoch, metric, search.space)] if importances else []
    context: dict[str, Any] = {
        "name": search.name,
        "folder": str(search.folder),
        "headline": leaderboard.describe_best(results, search.metrics) or "No trial can be ranked.",
        "sentence": sentence,
        "stats": search_stats(search, results),
        "train": leaderboard.best_trial(results, search.metrics)
        and f"cl-ray train --config {shlex.quote(str(search.folder))}/best.yaml",
        "history": history_charts(results, search.metrics, search.space),
        "importance": importance,
        "values": value_charts(comparable, epoch, metric, search.space),
        "images": trial_images(search, results),
        "front": len(search.metrics) > 1,
        "table": trial_table(search, results),
    }
    write_page(search.folder, render_page("search.html", context, package="cl_ray.tuning"))
    return sentence


def search_stats(search: Search, results: list[TrialResult]) -> list[Stat]:
    """Return how many trials ended how, the best metrics, and the time."""
    ends = Counter("stopped early" if r.status == "stopped" else r.status for r in results)
    ended = ", ".join(f"{number} {status}" for status, number in ends.items())
    stats = [Stat("Trials", str(len(results)), ended)]
    for metric in search.metrics:
        best = leaderboard.best_trial(results, [metric])
        if best:
            which = f"best: trial {best.number}, after {pluralize(best.epoch, 'epoch')}"
            stats.append(Stat(metric.name, format_number(best.metrics[metric.name]), which))
    seconds = format_duration(sum(result.seconds for result in results))
    epochs = pluralize(sum(result.epoch for result in results), "epoch")
    return [*stats, Stat("Training", seconds, f"{epochs} in all")]


def trial_images(search: Search, results: list[TrialResult]) -> dict[str, str]:
    """Return the last samples of the best and the worst trial that have any: URIs by title."""
    best = leaderboard.best_trial(results, search.metrics)
    order = [result for result in leaderboard.rank_trials(results, search.metrics) if result.epoch]
    shown = [("best", best)] if best else []
    if len(order) > 1 and order[-1] is not best:
        shown.append(("worst", order[-1]))
    images = {}
    for name, result in shown:
        for epoch in range(result.epoch, 0, -1):
            file = f"{result.number:04d}/samples/samples-{epoch:04d}.png"
            png = search.trials_folder.read(file)
            if png:
                title = f"{name}: trial {result.number} ({result.status}), after epoch {epoch}"
                images[title] = png_uri(png)
                break
    return images


def trial_table(
    search: Search, results: list[TrialResult]
) -> tuple[list[str], list[tuple[bool, list[str]]]]:
    """Return all trials, the best first: column names; whether a row is ranked, and its cells.

    A star marks the Pareto front of several metrics.
    """
    fields, names = list(search.space.parameters), [metric.name for metric in search.metrics]
    head = ["trial", "state", "epoch", *names, *map(leaderboard.short_name, fields), ""]
    front = leaderboard.search_front(results, search.metrics) if len(names) > 1 else []
    rows = []
    for result in leaderboard.rank_trials(results, search.metrics):
        scores = [result.metrics.get(name, "–") for name in names]
        values = [result.values.get(field, "–") for field in fields]
        numbers = [
            format_number(value) if isinstance(value, float) else str(value)
            for value in [*scores, *values]
        ]
        number = f"{result.number}{' *' if result in front else ''}"
        cells = [number, result.status, str(result.epoch), *numbers, result.reason]
        rows.append((result.is_valid, cells))
    return head, rows
