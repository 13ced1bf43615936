"""Hears of every trial from Ray Tune and writes it down: in the study, then for people."""

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import optuna
from ray.exceptions import RayActorError
from ray.tune import Callback
from ray.tune.experiment import Trial

from cl_ray.errors import UserError
from cl_ray.training.failures import failure_reason
from cl_ray.tuning.leaderboard import format_values
from cl_ray.tuning.study import (
    SearchMetric,
    StudyFile,
    TrialResult,
    finish_trial,
    resume_trial,
    trial_result,
)
from cl_ray.tuning.trial import ERROR, TrialContext

Show = Callable[[str, list[TrialResult]], None]
"""Called with a line on what happened, or none, and all trials."""


class StudyCallback(Callback):
    """Keeps the study and tells whoever shows it.

    Args:
        study: The study.
        file: Where it is kept.
        job: What the trials have in common.
        show: Shows what happened.
        keep: Called with all trials when one is over.
    """

    def __init__(
        self,
        study: optuna.Study,
        file: StudyFile,
        job: TrialContext,
        show: Show,
        keep: Callable[[list[TrialResult]], None],
    ):
        self.study, self.file, self.job, self.show, self.keep = study, file, job, show, keep
        self.trials: dict[int, optuna.Trial] = {}
        self.rows: dict[int, TrialResult] = {}
        for trial in study.get_trials(deepcopy=False):
            if trial.state != optuna.trial.TrialState.WAITING:
                self.rows[trial.number] = trial_result(trial)

    def begin(self, number: int, values: dict[str, Any]) -> None:
        """A trial runs, for the first time in this search or of one that goes on."""
        known = self.rows.get(number)
        self.rows[number] = known or TrialResult(number, "running", values)
        if not known:
            self.tell(f"trial {number} starts: {format_values(values)}")
        else:
            self.tell(f"trial {number} goes on after epoch {known.epoch}")
        self.trial(number)
        self.file.push()  # before it leaves anything in its folder

    def hear(self, result: dict[str, Any]) -> None:
        """A trial has finished an epoch, or diverged in it."""
        number = int(result["number"])
        before = self.rows[number].history
        row = from_result(result, self.job.metrics, self.rows[number])
        self.rows[number] = row
        trial = self.trial(number)
        bad = row.status in ("diverged", "collapsed")
        progress = {k: v for k, v in row.__dict__.items() if k not in ("number", "status")}
        trial.set_user_attr("progress", progress)
        if len(self.job.metrics) == 1 and not bad:
            for epoch, value in row.history.items():
                if epoch not in before:  # an epoch whose end a killed driver did not hear is told
                    trial.report(value, epoch)
        self.file.push()
        for why in result.get("lost", ()):
            self.tell(f"trial {number}: {why}")
        epochs = self.job.base.epochs
        scores = "  ".join(
            f"{m.name} {row.metrics[m.name]:.4g}" for m in self.job.metrics if not bad
        )
        speed = f"  {result['speed']:,.0f} images/s" if result["speed"] else ""
        self.tell(f"trial {number} epoch {row.epoch}/{epochs}  {row.reason or scores}{speed}")

    def end(self, number: int, error: str | None = None) -> None:
        """A trial is over."""
        row = self.rows[number]
        if error is not None:
            row = replace(row, status="failed", reason=error)
        elif row.status == "running":
            row = replace(row, status="stopped")
        finish_trial(self.study, self.trial(number), row, self.job.metrics)
        self.rows[number] = row
        self.keep(list(self.rows.values()))
        self.file.push()
        said = {"stopped": f"is stopped after epoch {row.epoch}", "finished": "is finished"}
        self.tell(f"trial {number} {said.get(row.status, f'{row.status}: {row.reason}')}")

    def trial(self, number: int) -> optuna.Trial:
        """The study's own."""
        if number not in self.trials:
            self.trials[number] = resume_trial(self.study, number)
        return self.trials[number]

    def error_of(self, trial: Trial) -> str:
        """Why a trial failed: what it wrote down, or what Ray knows of the end of its process."""
        if trial.pickled_error_file:
            error = pickle.loads(Path(trial.pickled_error_file).read_bytes())
            if isinstance(error, RayActorError) and not error.actor_init_failed:
                return failure_reason(error)
        text = (self.job.run_folder(number_of(trial)).read(ERROR) or b"").decode().strip()
        if not text:
            return "its process died"
        return text.splitlines()[-1].removeprefix(f"{UserError.__module__}.UserError: ")

    def tell(self, line: str = "") -> None:
        """Pass it on."""
        self.show(line, list(self.rows.values()))

    def begin_of(self, trial: Trial) -> None:
        """Take note of one that runs; or is no more, as its process could not set it up."""
        number = number_of(trial)
        if number not in self.trials:
            self.begin(number, trial.config["point"]["values"])

    # What Ray Tune calls.

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """A trial runs."""
        self.begin_of(trial)

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """A trial said something."""
        self.hear(result)

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        """A trial is over, by itself or stopped."""
        self.end(number_of(trial))

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """A trial failed and is tried again."""
        self.begin_of(trial)
        self.tell(f"trial {number_of(trial)} is tried once more: {self.error_of(trial)}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """A trial failed for good."""
        self.begin_of(trial)
        self.end(number_of(trial), self.error_of(trial))

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """Time goes by."""
        self.tell()

    def __reduce__(self) -> Any:
        """Ray Tune pickles a search's callbacks for a restoring that is not used."""
        return Callback, ()


def number_of(trial: Trial) -> int:
    """The study's number of one of Tune's trials."""
    return int(trial.config["point"]["number"])


def from_result(
    result: dict[str, Any], metrics: list[SearchMetric], before: TrialResult
) -> TrialResult:
    """A trial's result as a row."""
    bad = result["status"] in ("diverged", "collapsed")
    epoch = int(result["epoch"])
    reached = {} if bad else {epoch: float(result[metrics[0].name])}
    written = {} if bad else {int(k): float(v) for k, v in result["history"].items()}
    return TrialResult(
        number=int(result["number"]),
        status=result["status"],
        values=dict(result["values"]),
        metrics={} if bad else dict(result["metrics"]),
        epoch=epoch,
        seconds=round(result["seconds"], 2),
        reason=result["reason"],
        history={
            **{k: v for k, v in sorted({**written, **before.history}.items()) if k < epoch},
            **reached,
        },
    )
