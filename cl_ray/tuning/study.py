"""The Optuna study: the one record of what was tried, from which a search goes on.

Ray Tune's own snapshots lag behind a killed driver by up to ten seconds, in which trials finish.
So nothing is restored from them: every trial's values and outcome stand in the study as soon as
they are known, every trial's state in its own folder, and a search that goes on makes a new Tune
experiment that takes up the study's unfinished trials first.
"""

import contextlib
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from cl_ray.data.dataset import first_error_line
from cl_ray.errors import UserError, redact_credentials
from cl_ray.storage import RunStorage
from cl_ray.tuning.space import Values

FILE = "study.log"
WORST = {True: 0.0, False: 1e6}
"""What a trial without a figure scores, where larger is better and where smaller is."""


@dataclass(frozen=True)
class SearchMetric:
    """A figure that is optimised.

    Args:
        name: The evaluation's name for it.
        larger: Whether larger is better.
    """

    name: str
    larger: bool

    @property
    def worst(self) -> float:
        """What a trial scores that has none."""
        return WORST[self.larger]

    @property
    def mode(self) -> str:
        """As Ray Tune has it."""
        return "max" if self.larger else "min"


@dataclass(frozen=True)
class TrialResult:
    """A trial, as the leaderboard has it.

    Args:
        number: Its number, which names its folder.
        status: running, finished, stopped (early), diverged, collapsed or failed.
        values: What was searched.
        metrics: What it reached, each metric's figure among it.
        epoch: Epochs that it was trained for.
        seconds: Of training.
        reason: Why it ended otherwise than finished.
        history: The first metric by epoch.
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
    def counts(self) -> bool:
        """Whether its metrics say what its values are worth."""
        return self.status in ("finished", "stopped")


class StudyFile:
    """Where a study is kept: a journal file in the search's folder, or a storage of the user's.

    Args:
        folder: The search's folder. On an object store, which cannot append, the journal is
            local and copied by `push`.
        url: An Optuna storage URL; None is the journal.
    """

    def __init__(self, folder: RunStorage, url: str | None):
        self.folder, self.url = folder, url
        self.path = Path(folder.uri) / FILE
        if folder.remote:
            import tempfile

            self.spool = tempfile.TemporaryDirectory(prefix=f"{folder.name}-")
            self.path = Path(self.spool.name) / FILE

    def open(self) -> BaseStorage:
        """The storage, mended where a killed process left half a line or a lock.

        Raises:
            UserError: It is not reached, or needs a package that is not there.
        """
        if self.url:
            return _database(self.url)
        if self.folder.remote and not self.path.exists():
            self.path.write_bytes(self.folder.read(FILE) or b"")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        for lock in self.path.parent.glob(f"{FILE}.*lock*"):
            lock.unlink()  # the search's own lock is held: nobody else writes
        with contextlib.suppress(FileNotFoundError), self.path.open("r+b") as journal:
            lines = journal.read()
            journal.truncate(lines.rfind(b"\n") + 1)
        try:
            return JournalStorage(JournalFileBackend(str(self.path)))
        except Exception as error:
            raise UserError(
                f"{self.path} cannot be read as a study ({first_error_line(error)}): it was written by "
                "another version of Optuna or damaged; take another --name."
            ) from error

    def push(self) -> None:
        """Copy the journal to an object store."""
        if self.folder.remote and not self.url and self.path.exists():
            self.folder.write(FILE, self.path.read_bytes())

    def __str__(self) -> str:
        return redact_credentials(self.url) if self.url else f"{self.folder}/{FILE}"


def _database(url: str) -> BaseStorage:
    try:
        return optuna.storages.get_storage(url)
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, ModuleNotFoundError):
            cause = cause.__cause__ or cause.__context__
        if isinstance(cause, ModuleNotFoundError):
            raise UserError(
                f"study {redact_credentials(url)!r} needs the package {cause.name}: "
                f"pip install {cause.name}."
            ) from error
        raise UserError(
            f"study {redact_credentials(url)!r} cannot be opened: {first_error_line(error)}."
        ) from error


class SeededRandomSampler(optuna.samplers.RandomSampler):
    """Draws that follow from (seed, trial, field): alike whatever was killed on the way."""

    def __init__(self, seed: int):
        super().__init__(seed=seed)
        self.seed = seed

    def sample_independent(
        self,
        study: optuna.Study,
        trial: optuna.trial.FrozenTrial,
        param_name: str,
        param_distribution: optuna.distributions.BaseDistribution,
    ) -> Any:
        """A value of one field."""
        numbers = [self.seed, trial.number, zlib.crc32(param_name.encode())]
        seed = int(np.random.SeedSequence(numbers).generate_state(1)[0])
        drawn = optuna.samplers.RandomSampler(seed=seed)
        return drawn.sample_independent(study, trial, param_name, param_distribution)


def build_sampler(kind: str, seed: int, trials: int) -> optuna.samplers.BaseSampler:
    """Who proposes. TPE is told of trials under way, so that two at once are not alike."""
    if kind == "random":
        return SeededRandomSampler(seed)
    if kind == "nsga2":
        return optuna.samplers.NSGAIISampler(
            seed=seed, population_size=max(4, min(50, trials // 4))
        )
    startup = max(4, min(10, trials // 3))
    return optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup, constant_liar=True)


def has_study(storage: BaseStorage, name: str) -> bool:
    """Whether a study of that name is there.

    Raises:
        UserError: The storage cannot be read.
    """
    try:
        return name in {s.study_name for s in optuna.get_all_study_summaries(storage)}
    except Exception as error:
        raise UserError(
            f"The study {name} cannot be read ({first_error_line(error)}): it was written by another "
            "version or damaged; take another --name."
        ) from error


def open_study(
    storage: BaseStorage, name: str, metrics: list[SearchMetric], sampler: Any, fresh: bool
) -> optuna.Study:
    """The study of that name, made if this is a fresh search.

    Raises:
        UserError: It is there and should not be, or the other way round.
    """
    known = has_study(storage, name)
    if fresh and known:
        raise UserError(
            f"The study {name} is there already: --resume {name} goes on with it, another --name "
            "begins anew."
        )
    if not fresh and not known:
        raise UserError(f"There is no study {name}: begin it with --name {name}.")
    kinds = optuna.study.StudyDirection
    directions = [kinds.MAXIMIZE if m.larger else kinds.MINIMIZE for m in metrics]
    if fresh:
        return optuna.create_study(
            storage=storage, study_name=name, directions=directions, sampler=sampler
        )
    return optuna.load_study(study_name=name, storage=storage, sampler=sampler)


def trial_results(study: optuna.Study) -> list[TrialResult]:
    """Every trial that was begun, by number."""
    trials = study.get_trials(deepcopy=False)
    return [trial_result(trial) for trial in trials if trial.state != TrialState.WAITING]


def trial_result(trial: optuna.trial.FrozenTrial) -> TrialResult:
    """A trial as the study knows it."""
    known = {"values": trial.user_attrs.get("values", dict(trial.params))}
    if trial.state == TrialState.RUNNING:
        known |= {**trial.user_attrs.get("progress", {}), "status": "running"}
    else:
        known |= {"status": "failed", **trial.user_attrs.get("outcome", {})}
    known["history"] = {int(k): v for k, v in known.get("history", {}).items()}
    return TrialResult(number=trial.number, **known)


def unfinished_trials(study: optuna.Study) -> list[int]:
    """Numbers of trials that were begun and not brought to an end."""
    return [t.number for t in study.get_trials(deepcopy=False) if t.state == TrialState.RUNNING]


def resume_trial(study: optuna.Study, number: int) -> optuna.Trial:
    """A trial that is under way, to go on with: what was drawn for it is given again."""
    trial = study.get_trials(deepcopy=False)[number]
    return optuna.Trial(study, trial._trial_id)


def finish_trial(
    study: optuna.Study, trial: optuna.Trial, row: TrialResult, metrics: list[SearchMetric]
) -> None:
    """Write a trial's end down, for good.

    A trial that was stopped early is told as pruned, which TPE ranks by how far it came; one that
    diverged or collapsed scores worst; one that failed says nothing of its values.
    """
    outcome = {k: v for k, v in row.__dict__.items() if k != "number"}
    trial.set_user_attr("outcome", outcome)
    if row.status == "failed":
        study.tell(trial, state=TrialState.FAIL)
    elif row.status == "stopped" and len(metrics) == 1:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        values = [row.metrics.get(m.name, m.worst) if row.counts else m.worst for m in metrics]
        study.tell(trial, values)
