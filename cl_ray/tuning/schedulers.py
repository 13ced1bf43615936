"""Who stops a trial early, or changes it on the way."""

import random
from typing import Any

from ray.tune.experiment import Trial
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)

from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, TrialResult

REDUCTION = 3
"""Of the trials that reach a rung of successive halving, the best third goes on (Li et al., 2020,
section 3; they take 4)."""


class Halving(AsyncHyperBandScheduler):
    """Asynchronous successive halving that knows what earlier trials of the search reached."""

    def __init__(self, metric: SearchMetric, epochs: int, before: list[TrialResult]):
        super().__init__(
            time_attr="epoch",
            metric=metric.name,
            mode=metric.mode,
            max_t=max(epochs, 2),
            grace_period=1,
            reduction_factor=REDUCTION,
        )
        sign = 1 if metric.larger else -1
        for milestone, recorded in self._brackets[0]._rungs:
            for row in before:
                if milestone in row.history:
                    recorded[f"before-{row.number}"] = sign * row.history[milestone]


class Population(PopulationBasedTraining):
    """Population-based training (Jaderberg et al., 2017): the worse take over the better.

    A trial among the worst quarter takes a trial of the best quarter's networks, averages,
    optimisers, place and architecture, with its rates and weights perturbed; its number stays.
    """

    def __init__(self, metric: SearchMetric, space: Space, seed: int):
        self.space, self.random = space, random.Random(seed)
        super().__init__(
            time_attr="epoch",
            metric=metric.name,
            mode=metric.mode,
            perturbation_interval=1,
            quantile_fraction=0.25,
            custom_explore_fn=dict,
            log_config=False,
        )

    def _get_new_config(self, trial: Trial, trial_to_clone: Trial) -> tuple[dict[str, Any], Any]:
        theirs, own = trial_to_clone.config["point"], trial.config["point"]
        values = self.space.perturbed(theirs["values"], self.random)
        return {"point": {"number": own["number"], "values": values}}, {}


def build_scheduler(
    kind: str, metric: SearchMetric, epochs: int, space: Space, seed: int, before: list[TrialResult]
) -> TrialScheduler:
    """The scheduler of that name; `before` are earlier trials of the search."""
    if kind == "asha":
        return Halving(metric, epochs, before)
    if kind == "median":
        return MedianStoppingRule(
            time_attr="epoch", metric=metric.name, mode=metric.mode, grace_period=1
        )
    if kind == "pbt":
        return Population(metric, space, seed)
    return FIFOScheduler()
