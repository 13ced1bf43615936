"""What Ray Tune runs next: the study's unfinished trials, then what its sampler proposes."""

from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from cl_ray.config import Config
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, resume_trial, trial_result


class StudySearch(OptunaSearch):
    """OptunaSearch that takes up what was begun; the recorder tells the study what became of it.

    Args:
        study: The study.
        metrics: What is optimised.
        space: What is searched.
        base: The config that it changes.
        waiting: Numbers of trials that were begun and are to be finished first.
    """

    def __init__(
        self,
        study: optuna.Study,
        metrics: list[SearchMetric],
        space: Space,
        base: Config,
        waiting: list[int],
    ):
        names, modes = [m.name for m in metrics], [m.mode for m in metrics]
        several = len(metrics) > 1
        super().__init__(metric=names if several else names[0], mode=modes if several else modes[0])
        self._ot_study, self.waiting, self.points = study, list(waiting), dict[str, Any]()
        self._space = lambda trial: space.suggest(trial, base)

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """A trial's number and values."""
        if trial_id not in self.points:
            number = self.waiting.pop(0) if self.waiting else None
            self.points[trial_id] = point(self._ot_study, self._space, number)
        return {"point": self.points[trial_id]}

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """The recorder's."""

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The recorder's."""

    def save(self, checkpoint_path: str) -> None:
        """Nothing to save: all of it stands in the study."""

    def restore(self, checkpoint_path: str) -> None:
        """Nothing to restore."""


def point(study: optuna.Study, draw: Any, number: int | None) -> dict[str, Any]:
    """A trial's number and values, drawn anew or as they were when it was last heard of."""
    trial = study.ask() if number is None else resume_trial(study, number)
    values = draw(trial)
    if number is None:
        trial.set_user_attr("values", values)
    else:
        values = trial_result(study.get_trials(deepcopy=False)[number]).values or values
    return {"number": trial.number, "values": values}
