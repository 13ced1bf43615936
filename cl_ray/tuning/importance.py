"""Which searched fields a metric depends on, as far as the trials of a search can tell."""

import random
import statistics
import warnings
from dataclasses import replace

import optuna
from optuna.trial import FrozenTrial, TrialState, create_trial

from cl_ray.errors import pluralize
from cl_ray.tuning.leaderboard import short_name, short_names
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, TrialResult

RATES = ("optimizer.lr_g", "optimizer.lr_d")
MIN_COMPARABLE = 10
"""Comparable trials without which nothing is said about importances."""
_PERMUTATIONS = 19
_MIN_LATER = 4
"""Trials at an epoch for which it is preferred to an earlier one, where no epoch has ten."""


def comparable_trials(results: list[TrialResult]) -> tuple[list[TrialResult], int]:
    """Return the latest epoch that ten, and at least half, of the valid trials reached, and those.

    Metrics after one epoch and after ten are not compared with each other.
    """
    valid = [result for result in results if result.is_valid and result.history]
    epochs = sorted({epoch for result in valid for epoch in result.history}, reverse=True)
    for enough in (MIN_COMPARABLE, _MIN_LATER):
        for epoch in epochs:
            reached = [result for result in valid if epoch in result.history]
            if len(reached) >= max(enough, len(valid) / 2):
                return reached, epoch
    first = epochs[-1] if epochs else 0
    return [result for result in valid if first in result.history], first


def comparable_study(
    results: list[TrialResult], epoch: int, metric: SearchMetric, space: Space
) -> optuna.Study:
    """Build an in-memory study of comparable trials, for Optuna's importances and charts.

    Its parameters are the fields that all trials have and that differ, by their short names; its
    values are the metric's after the epoch, which all trials have reached.
    """
    study = optuna.create_study(direction=metric.direction)
    fields = [
        field
        for field in space.parameters
        if all(field in result.values for result in results)
        and len({result.values[field] for result in results}) > 1
    ]
    for result in results:
        study.add_trial(frozen_trial(result, fields, space, [result.history[epoch]]))
    return study


def frozen_trial(
    result: TrialResult, fields: list[str], space: Space, values: list[float] | None
) -> FrozenTrial:
    """Build a trial with parameters by short names; without values it is a pruned one."""
    names = short_names(space.parameters)
    return create_trial(
        state=TrialState.PRUNED if values is None else TrialState.COMPLETE,
        values=values,
        params={names[field]: result.values[field] for field in fields},
        distributions={names[f]: space.parameters[f].distribution() for f in fields},
        intermediate_values=result.history,
    )


def importance_evaluator() -> optuna.importance.FanovaImportanceEvaluator:
    """Build the evaluator of importances (fANOVA: Hutter et al., 2014)."""
    return optuna.importance.FanovaImportanceEvaluator(seed=0)


def parameter_importances(
    results: list[TrialResult], epoch: int, metric: SearchMetric, space: Space
) -> dict[str, float]:
    """Return the fraction of the metric's variance of the fields that matter, largest first.

    Those are the fields that explain more than any does when the metric is shuffled among the
    trials, 19 times (a permutation test at 5 %): by chance alone one of many fields explains half
    of the variance of few trials. Fewer than ten comparable trials give no importances.
    """
    values = [result.history[epoch] for result in results]
    study = comparable_study(results, epoch, metric, space)
    if len(results) < MIN_COMPARABLE or not study.trials[0].params or len(set(values)) < 2:
        return {}
    found, shuffle = _importances(study), random.Random(0)
    chance = 0.0
    for _ in range(_PERMUTATIONS):
        shuffled = [
            replace(result, history={epoch: value})
            for result, value in zip(results, shuffle.sample(values, len(values)), strict=True)
        ]
        by_chance = _importances(comparable_study(shuffled, epoch, metric, space))
        chance = max(chance, *by_chance.values())
    fields = {name: field for field, name in short_names(space.parameters).items()}
    # Of one field alone, nothing can be told from the fractions: it has all of the variance.
    return {fields[n]: found[n] for n in found if found[n] > chance or len(found) == 1}


def _importances(study: optuna.Study) -> dict[str, float]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(study, evaluator=importance_evaluator())
    return {name: float(importance) for name, importance in found.items()}


def importance_summary(
    results: list[TrialResult], epoch: int, metric: SearchMetric, importances: dict[str, float]
) -> str:
    """Return a sentence on the importances, which claims nothing of fewer than ten trials."""
    compared = f"{pluralize(len(results), 'trial')} after {pluralize(epoch, 'epoch')}"
    if len(results) < MIN_COMPARABLE:
        verb = "is" if len(results) == 1 else "are"
        subject = f"{compared} {verb}" if results else "No trial has a value of the metric: that is"
        return f"{subject} too few to estimate importances, which takes {MIN_COMPARABLE}."
    if not importances:
        return f"Of {compared}, no field explains more of {metric.name} than chance would."
    order = sorted(results, key=lambda r: r.history[epoch], reverse=metric.maximize)
    best = order[: len(order) // 4]
    parts = []
    for field, importance in list(importances.items())[:3]:
        values = [result.values[field] for result in best]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            typical = f"{statistics.median(values):.3g}"
        else:
            typical = str(statistics.mode(values))
        parts.append(
            f"{short_name(field)} ({importance:.0%} of the variance; {typical} in the best quarter)"
        )
    ratio = ""
    if all(rate in result.values for rate in RATES for result in best):
        median = statistics.median(r.values[RATES[1]] / r.values[RATES[0]] for r in best)
        ratio = f" In the best quarter, D's learning rate is {median:.2g} times G's."
    return f"Of {compared}, {metric.name} depends most on {', '.join(parts)}.{ratio}"
