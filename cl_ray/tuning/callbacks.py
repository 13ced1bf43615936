"""Callbacks of Ray Tune: record trials in the study, stop on Ctrl-C, release lost resources."""

import functools
import re
import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import optuna
from ray.tune import Callback
from ray.tune.experiment import Trial
from ray.util.placement_group import remove_placement_group

from cl_ray.errors import StorageError, UserError
from cl_ray.signals import handle_signal
from cl_ray.training.ray_compat import (
    lost_process_reason,
    optuna_trial,
    orphaned_placement_groups,
    tune_failure,
)
from cl_ray.tuning.leaderboard import format_values, write_leaderboard
from cl_ray.tuning.search import Search
from cl_ray.tuning.study import (
    SearchMetric,
    StudyStorage,
    TrialResult,
    finish_trial,
    trial_results,
    unfinished_trials,
)
from cl_ray.tuning.trial import ERROR_FILE

_PUSH_INTERVAL = 30.0
"""Seconds between two uploads of the journal by epochs; starts and ends of trials are uploaded."""
_ORPHAN_INTERVAL = 1.0
"""Seconds between two looks for lost placement groups."""


class _UnpickledCallback(Callback):
    """A callback that does not travel: Ray Tune pickles callbacks to restore an experiment."""

    def __reduce__(self) -> Any:
        return Callback, ()


def _ends_search_if_storage_fails(method: Callable[..., None]) -> Callable[..., None]:
    """Wrap an event of `StudyCallback`: failing storage ends the search in `on_step_end`.

    Of an exception that an event raises, Ray Tune keeps only the traceback, as text. Events after
    it are ignored, so that the trials that run are resumed.
    """

    @functools.wraps(method)
    def event(self: "StudyCallback", *arguments: Any, **named: Any) -> None:
        if self.storage_error is None:
            try:
                with self.storage.errors():
                    method(self, *arguments, **named)
            except StorageError as error:
                self.storage_error = error

    return event


class StudyCallback(_UnpickledCallback):
    """Records every trial in the study as it starts, reports and ends.

    It calls `show` with a line on what happened, which may be empty, and all trials.
    """

    def __init__(
        self,
        search: Search,
        study: optuna.Study,
        storage: StudyStorage,
        show: Callable[[str, list[TrialResult]], None],
    ):
        self.search, self.study, self.storage, self.show = search, study, storage, show
        results = trial_results(study, search.options.trials)
        self.results = {result.number: result for result in results}
        trials = {number: f"{number:04d}" for number in unfinished_trials(study)}
        self._begun = {n for n, t in trials.items() if search.trials_folder.subfolder(t).exists()}
        self._running: dict[int, optuna.Trial] = {}
        self.storage_error: StorageError | None = None

    @_ends_search_if_storage_fails
    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Record that a trial starts or resumes."""
        self._record_start(trial)

    @_ends_search_if_storage_fails
    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **_: Any
    ) -> None:
        """Record an epoch."""
        if "storage_fault" in result:
            raise StorageError(result["storage_fault"])
        number, metrics = int(result["number"]), self.search.metrics
        before, recorded = self.results[number], self._running[number]
        after = self.results[number] = _updated(before, result, metrics)
        recorded.set_user_attr("progress", after.to_dict())
        valid = after.status not in ("diverged", "collapsed")
        if len(metrics) == 1 and valid:
            for epoch, value in after.history.items():
                if epoch not in before.history:  # also one that a killed driver missed
                    recorded.report(value, epoch)
        self.storage.push(_PUSH_INTERVAL)
        for note in result["notes"]:
            self._show(f"trial {number}: {note}")
        scores = "  ".join(f"{m.name} {after.metrics[m.name]:.4g}" for m in metrics if valid)
        speed = f"  {result['speed']:,.0f} images/s" if result["speed"] else ""
        place = f"epoch {after.epoch}/{self.search.options.epochs}"
        self._show(f"trial {number} {place}  {after.reason or scores}{speed}")

    @_ends_search_if_storage_fails
    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        """Record that a trial has ended, by itself or stopped early."""
        result = self.results[trial_number(trial)]
        self._record_end(result if result.has_ended else replace(result, status="stopped"))

    @_ends_search_if_storage_fails
    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Show why a trial is tried again."""
        self._record_start(trial)
        self._show(f"trial {trial_number(trial)} is tried once more: {self._failure_reason(trial)}")

    @_ends_search_if_storage_fails
    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        """Record that a trial has failed for good."""
        self._record_start(trial)
        result = self.results[trial_number(trial)]
        self._record_end(replace(result, status="failed", reason=self._failure_reason(trial)))

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        """Update what is shown: which trials run, and which wait for resources or for others."""
        if self.storage_error:
            raise self.storage_error
        for trial in trials:
            result = self._result(trial)
            if not result.has_ended:
                status = "running" if trial.status == Trial.RUNNING else "waiting"
                self.results[result.number] = replace(result, status=status)
        self._show()

    def _result(self, trial: Trial) -> TrialResult:
        """Return what is known of a trial."""
        number, values = trial_number(trial), trial.config["point"]["values"]
        known = self.results.get(number, TrialResult(number, "waiting", values))
        return known if known.epoch else replace(known, values=values)

    def _record_start(self, trial: Trial) -> None:
        """Record a trial at its first event, which is an error if it could not be set up."""
        number = trial_number(trial)
        if number in self._running:
            return
        result = self.results[number] = replace(self._result(trial), status="running")
        self._running[number] = optuna_trial(self.study, number)
        self._show(
            f"trial {number} resumes after epoch {result.epoch}"
            if number in self._begun
            else f"trial {number} starts: {format_values(result.values)}"
        )
        self.storage.push()  # before the trial writes anything to its folder

    def _record_end(self, result: TrialResult) -> None:
        number = result.number
        finish_trial(self.study, self._running[number], result, self.search.metrics)
        self.results[number] = result
        write_leaderboard(self.search, list(self.results.values()))
        self.storage.push()
        ends = {"stopped": f"is stopped after epoch {result.epoch}", "finished": "is finished"}
        self._show(f"trial {number} {ends.get(result.status, f'{result.status}: {result.reason}')}")

    def _failure_reason(self, trial: Trial) -> str:
        """Return the error that the trial wrote down, or how its process ended."""
        text = tune_failure(trial)
        if re.match(r"The actor (died unexpectedly|\w+ is unavailable)", text):
            return lost_process_reason(text)
        file = f"{trial_number(trial):04d}/{ERROR_FILE}"
        written = (self.search.trials_folder.read(file) or b"").decode()
        # What was raised before the trial had its folder is only in the text of Ray Tune.
        lines = (written.strip() or text.strip()).splitlines()
        if not lines:
            return "its process died"
        return lines[-1].removeprefix(f"{UserError.__module__}.UserError: ")

    def _show(self, line: str = "") -> None:
        self.show(line, list(self.results.values()))


def trial_number(trial: Trial) -> int:
    """Return the number that one of Tune's trials has in the study."""
    return int(trial.config["point"]["number"])


def _updated(
    before: TrialResult, result: dict[str, Any], metrics: list[SearchMetric]
) -> TrialResult:
    """Return a trial after the result that it reports."""
    valid = result["status"] not in ("diverged", "collapsed")
    epoch = int(result["epoch"])
    logged = {int(k): float(v) for k, v in result["history"].items()} if valid else {}
    history = {k: v for k, v in sorted({**logged, **before.history}.items()) if k < epoch}
    if valid:
        history[epoch] = float(result[metrics[0].name])
    return TrialResult(
        number=before.number,
        status=result["status"],
        values=dict(result["values"]),
        metrics=dict(result["metrics"]) if valid else {},
        epoch=epoch,
        seconds=round(result["seconds"], 2),
        reason=result["reason"],
        history=history,
    )


class Interrupted(KeyboardInterrupt):
    """The search was stopped by Ctrl-C."""


class InterruptCallback(_UnpickledCallback):
    """Ends the search on Ctrl-C; Ray Tune's own handler would wait for the trials' epochs."""

    def __init__(self, say: Callable[[str], None]):
        self.say = say
        self._requested = threading.Event()

    def catch_sigint(self) -> AbstractContextManager[None]:
        """Note the first Ctrl-C; a second one is handled as before."""
        before = signal.getsignal(signal.SIGINT)

        def request_stop(*_: Any) -> None:
            signal.signal(signal.SIGINT, before)
            self._requested.set()

        return handle_signal(signal.SIGINT, request_stop)

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """End the search if Ctrl-C was pressed; Ray Tune asks ten times a second.

        Raises:
            Interrupted: Ctrl-C was pressed. Ray Tune does not catch it, as it is no `Exception`.
        """
        if self._requested.is_set():
            self.say("Stopping: the running trials go back to their last checkpoint.")
            raise Interrupted


class OrphanedPlacementGroups(_UnpickledCallback):
    """Releases what a trial's TorchTrainer had reserved when the trial's process died.

    Ray Train leaves that to an actor that asks the dashboard's state API whether the trainer is
    dead. Without a dashboard it never learns, and the trial's next attempt would wait forever for
    the resources that the dead one holds.
    """

    def __init__(self) -> None:
        self._last = 0.0

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Release them, once a second."""
        if time.monotonic() - self._last < _ORPHAN_INTERVAL:
            return
        self._last = time.monotonic()
        for group in orphaned_placement_groups():
            remove_placement_group(group)
