"""The Optuna study: the record of all trials, from which a search resumes.

Ray Tune's snapshots lag behind a killed driver by up to ten seconds, in which trials finish, so
nothing is restored from them. Every trial's values and outcome are in the study as soon as they
are known, and its checkpoints are in its own folder. A resumed search starts a new Tune experiment
that runs the study's unfinished trials first.
"""

import contextlib
import math
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from cl_ray.errors import StorageError, UserError, first_error_line, storage_errors
from cl_ray.storage import RunStorage, sync
from cl_ray.training.ray_compat import optuna_trial
from cl_ray.tuning.space import Values
from cl_ray.uri import public_uri, remember_secrets

_JOURNAL = "study.log"


@dataclass(frozen=True)
class SearchMetric:
    """A metric of the evaluation that is optimized."""

    name: str
    maximize: bool

    @property
    def worst(self) -> float:
        """The score of a trial without a value of this metric."""
        return 0.0 if self.maximize else 1e6

    @property
    def direction(self) -> StudyDirection:
        """The direction as Optuna names it."""
        return StudyDirection.MAXIMIZE if self.maximize else StudyDirection.MINIMIZE

    @property
    def mode(self) -> str:
        """The direction as Ray Tune names it."""
        return "max" if self.maximize else "min"


@dataclass(frozen=True)
class TrialResult:
    """A trial as the leaderboard shows it.

    Args:
        number: Its number, which names its folder.
        status: waiting, running, finished, stopped (early), diverged, collapsed or failed.
        metrics: Its last metrics, those that are optimized among them.
        epoch: Epochs that it has trained.
        reason: Why it diverged, collapsed or failed.
        history: The first optimized metric by epoch.
    """

    number: int
    status: str
    values: Values
    metrics: dict[str, float] = field(default_factory=dict)
    epoch: int = 0
    seconds: float = 0.0
    reason: str = ""
    history: dict[int, float] = field(default_factory=dict)

    @property
    def is_valid(self) -> bool:
        """Whether its metrics can be ranked."""
        return self.status in ("finished", "stopped")

    @property
    def has_ended(self) -> bool:
        """Whether it trains no further."""
        return self.status not in ("waiting", "running")

    def to_dict(self) -> dict[str, Any]:
        """Return everything but the number."""
        return {name: value for name, value in asdict(self).items() if name != "number"}


class StudyStorage:
    """Where a study is stored: a journal file in the search's folder, or an Optuna storage URL.

    Args:
        folder: The search's folder. An object store cannot append, so its journal is a local file
            that `push` uploads.
        url: An Optuna storage URL; None is the journal.
    """

    def __init__(self, folder: RunStorage, url: str | None):
        self.folder, self.url = folder, url
        remember_secrets(url or "")
        self.path = Path(folder.uri) / _JOURNAL
        self._pushed_at = -math.inf
        if folder.remote:
            self._local = tempfile.TemporaryDirectory(prefix=f"{folder.name}-")
            self.path = Path(self._local.name) / _JOURNAL

    def open(self) -> BaseStorage:
        """Open the storage; repair a journal that a killed process left half written or locked.

        Raises:
            UserError: It cannot be reached or read, or needs a package that is not installed.
            OSError: The journal cannot be written.
        """
        if self.url:
            return _open_database(self.url)
        if self.folder.remote and not self.path.exists():
            self.path.write_bytes(self.folder.read(_JOURNAL) or b"")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for lock in self.path.parent.glob(f"{_JOURNAL}.*lock*"):
            lock.unlink()  # the search's own lock is held: nobody else writes
        with contextlib.suppress(FileNotFoundError), self.path.open("r+b") as journal:
            journal.truncate(journal.read().rfind(b"\n") + 1)
        try:
            storage = JournalStorage(JournalFileBackend(str(self.path)))
            sync(self.path.parent)  # Optuna syncs the content
            return storage
        except OSError:
            raise
        except Exception as error:
            raise UserError(
                f"{self.path} cannot be read as a study ({first_error_line(error)}): it was "
                "written by another version of Optuna or damaged; take another --name."
            ) from error

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Within the context, turn an error of storage that fails into one sentence.

        Raises:
            StorageError: The folder or the study cannot be written.
        """
        with storage_errors(self.folder):
            try:
                yield
            except optuna.exceptions.StorageInternalError as error:  # of a database
                reason = first_error_line(error.__cause__ or error)
                raise StorageError(
                    f"The study {self} cannot be written ({reason}): mend that, then give the same "
                    "command again."
                ) from error

    def push(self, interval: float = 0.0) -> None:
        """Upload the journal to an object store, unless that was done within the interval (s)."""
        due = time.monotonic() - self._pushed_at >= interval
        if due and self.folder.remote and not self.url and self.path.exists():
            self.folder.write(_JOURNAL, self.path.read_bytes())
            self._pushed_at = time.monotonic()

    def __str__(self) -> str:
        return public_uri(self.url) if self.url else f"{self.folder}/{_JOURNAL}"


def _open_database(url: str) -> BaseStorage:
    try:
        return optuna.storages.get_storage(url)
    except Exception as error:
        shown = public_uri(url)
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ModuleNotFoundError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise UserError(
                f"study {shown!r} needs the package {cause.name}: pip install {cause.name}."
            ) from error
        raise UserError(f"study {shown!r} cannot be opened: {first_error_line(error)}.") from error


class SeededRandomSampler(optuna.samplers.RandomSampler):
    """A random sampler whose values depend on (seed, trial, field) alone, resumed or not."""

    def __init__(self, seed: int):
        super().__init__(seed=seed)
        self.seed = seed

    def sample_independent(
        self,
        study: optuna.Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: optuna.distributions.BaseDistribution,
    ) -> Any:
        """Draw a value of one field."""
        entropy = [self.seed, trial.number, zlib.crc32(param_name.encode())]
        seed = int(np.random.SeedSequence(entropy).generate_state(1)[0])
        sampler = optuna.samplers.RandomSampler(seed=seed)
        return sampler.sample_independent(study, trial, param_name, param_distribution)


def build_sampler(
    kind: str, seed: int, trials: int, num_metrics: int = 1
) -> optuna.samplers.BaseSampler:
    """Build the sampler that proposes values.

    Optuna 4 and 5 have different defaults of TPE, so they are set here: multivariate for one
    metric, and constant liar, which keeps trials that run at the same time apart. `trials` is how
    many the whole search has; the first third of them, four to ten, is random. Trials that diverged
    or collapsed are infeasible: both samplers rank them below all others, also below trials that
    were stopped early.
    """
    if kind == "random":
        return SeededRandomSampler(seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        warnings.simplefilter("ignore", FutureWarning)  # Optuna 4 has no Trial.set_constraint
        if kind == "nsga2":
            population = max(4, min(50, trials // 4))
            return optuna.samplers.NSGAIISampler(
                seed=seed, population_size=population, constraints_func=_constraints
            )
        return optuna.samplers.TPESampler(
            seed=seed,
            n_startup_trials=startup_trials(trials),
            multivariate=num_metrics == 1,
            constant_liar=True,
            constraints_func=_constraints,
        )


def startup_trials(trials: int) -> int:
    """Return how many trials of a search TPE draws at random before it models any."""
    return max(4, min(10, trials // 3))


def _constraints(trial: FrozenTrial) -> tuple[float]:
    status = trial.user_attrs.get("outcome", {}).get("status")
    return (1.0 if status in ("diverged", "collapsed") else 0.0,)


def trial_results(study: optuna.Study, trials: int) -> list[TrialResult]:
    """Return every trial by number; of those that wait, as many as a search of `trials` lacks."""
    results = [trial_result(trial) for trial in study.get_trials(deepcopy=False)]
    waiting = [result.number for result in results if not result.has_ended]
    surplus = waiting[missing_trials(results, trials) :]
    return [result for result in results if result.number not in surplus]


def trial_result(trial: FrozenTrial) -> TrialResult:
    """Return a trial as the study records it; one that has not ended waits to be run."""
    drawn = trial.params or trial.system_attrs.get("fixed_params", {})  # the latter if enqueued
    fields = {"values": trial.user_attrs.get("values", dict(drawn))}
    if not trial.state.is_finished():
        fields |= {**trial.user_attrs.get("progress", {}), "status": "waiting"}
    else:
        fields |= {"status": "failed", **trial.user_attrs.get("outcome", {})}
    history = fields.get("history", {}).items()
    fields["history"] = {int(epoch): v for epoch, v in history if math.isfinite(v)}
    return TrialResult(number=trial.number, **fields)


def unfinished_trials(study: optuna.Study) -> list[int]:
    """Return the numbers of the trials that were started and have not ended."""
    running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
    return [trial.number for trial in running]


def missing_trials(results: list[TrialResult], trials: int) -> int:
    """Return how many trials are left to run, of so many in all; failed ones count as run."""
    return max(0, trials - sum(result.has_ended for result in results))


def ask_point(
    study: optuna.Study, suggest: Callable[[optuna.Trial], Values], number: int | None
) -> dict[str, Any]:
    """Return the `number` and `values` of a new trial, or of the one of this number to resume."""
    if number is not None:
        recorded = study.get_trials(deepcopy=False)[number]
        if "values" in recorded.user_attrs:
            return {"number": number, "values": trial_result(recorded).values}
    trial = study.ask() if number is None else optuna_trial(study, number)
    try:
        values = suggest(trial)
    except ValueError as error:  # enqueued by hand, with values that the space does not have
        reason = f"enqueued outside of the space: {first_error_line(error)}"
        trial.set_user_attr(
            "outcome", TrialResult(trial.number, "failed", {}, reason=reason).to_dict()
        )
        study.tell(trial, state=TrialState.FAIL)
        return ask_point(study, suggest, None)
    trial.set_user_attr("values", values)
    return {"number": trial.number, "values": values}


def finish_trial(
    study: optuna.Study, trial: optuna.Trial, result: TrialResult, metrics: list[SearchMetric]
) -> None:
    """Record how a trial ended.

    A trial that was stopped early is recorded as pruned, which TPE ranks by how far it got. One
    that diverged or collapsed gets the worst score. One that failed is not used by the sampler.
    """
    trial.set_user_attr("outcome", result.to_dict())
    if result.status == "failed":
        study.tell(trial, state=TrialState.FAIL)
    elif result.status == "stopped" and len(metrics) == 1:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        scores = result.metrics if result.is_valid else {}
        study.tell(trial, [scores.get(metric.name, metric.worst) for metric in metrics])
