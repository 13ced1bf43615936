"""What mattered: which of the searched fields a figure went by, as far as trials can tell."""

import statistics
import warnings

import optuna

from cl_ray.report.chart import count
from cl_ray.tuning.leaderboard import short
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, TrialResult

RATES = ("optimizer.lr_g", "optimizer.lr_d")
FEWEST = 10
"""Comparable trials without which nothing is said of what mattered."""
SHOWN = 4
"""Trials at an epoch for which, where there are never ten, it is shown before an earlier one."""


def comparable(rows: list[TrialResult]) -> tuple[list[TrialResult], int]:
    """Trials at the latest epoch that ten, and at least half of those that count, have reached.

    Metrics after one epoch and after ten are not compared with each other.
    """
    counted = [row for row in rows if row.counts and row.history]
    epochs = sorted({epoch for row in counted for epoch in row.history}, reverse=True)
    for enough in (FEWEST, SHOWN):
        for epoch in epochs:
            alike = [row for row in counted if epoch in row.history]
            if len(alike) >= max(enough, len(counted) / 2):
                return alike, epoch
    return [row for row in counted if epochs and epochs[-1] in row.history], (epochs or [0])[-1]


def importances(
    rows: list[TrialResult], epoch: int, metric: SearchMetric, space: Space
) -> dict[str, float]:
    """What share of the figure's variance each field explains (fANOVA: Hutter et al., 2014)."""
    fields = [f for f in space.parameters if all(f in row.values for row in rows)]
    fields = [f for f in fields if len({row.values[f] for row in rows}) > 1]
    if len(rows) < FEWEST or not fields or len({r.history[epoch] for r in rows}) < 2:
        return {}
    study = optuna.create_study(direction="maximize" if metric.larger else "minimize")
    ranges = {field: space.parameters[field].distribution() for field in fields}
    for row in rows:
        values = {field: row.values[field] for field in fields}
        study.add_trial(
            optuna.trial.create_trial(params=values, distributions=ranges, value=row.history[epoch])
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {field: float(weight) for field, weight in found.items()}


def what_mattered(
    rows: list[TrialResult], epoch: int, metric: SearchMetric, weights: dict[str, float]
) -> str:
    """One sentence, which claims nothing where fewer than ten trials can be compared."""
    alike = f"{count(len(rows), 'trial')} after {count(epoch, 'epoch')}"
    if len(rows) < FEWEST:
        verb = "is" if len(rows) == 1 else "are"
        some = f"{alike} {verb}" if rows else "No trial has a figure: that is"
        return f"{some} too few to say what mattered; it takes {FEWEST} that can be compared."
    if not weights:
        return f"{alike} do not differ enough to say what mattered."
    order = sorted(rows, key=lambda r: r.history[epoch], reverse=metric.larger)
    good = order[: len(order) // 4]
    told = []
    for field, weight in list(weights.items())[:3]:
        values = [row.values[field] for row in good]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            typical = f"{statistics.median(values):.3g}"
        else:
            typical = str(statistics.mode(values))
        told.append(f"{short(field)} ({weight:.0%} of the differences; {typical} among the best)")
    ratio = ""
    if all(rate in row.values for rate in RATES for row in good):
        middle = statistics.median(r.values[RATES[1]] / r.values[RATES[0]] for r in good)
        ratio = f" The best quarter trains D at {middle:.2g} times G's rate."
    return f"Of {alike}, {metric.name} went by {', '.join(told)}.{ratio}"
