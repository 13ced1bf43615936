"""A run's progress: the actor that workers report it to, and its display by the driver."""

import threading
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cl_ray.errors import format_duration

if TYPE_CHECKING:  # the actor's process imports this module, and shows nothing
    import ray.actor
    import ray.train
    from rich.console import Console

    from cl_ray.config import Config

LOG_EVERY = 10.0
"""Seconds between two progress lines if the output is no terminal."""

SHOWN_METRICS = {
    "d/adversarial": "D",
    "d/contrastive": "contrast",
    "g/adversarial": "G",
    "g/reconstruction": "recon",
    "score/real": "real",
    "score/fake": "fake",
}
"""The metrics of a progress line, and their short names."""


@dataclass(frozen=True)
class TrialInfo:
    """What a run that is a trial of a search knows of it.

    Args:
        hparams: The trial's value of each searched field, for TensorBoard's HPARAMS.
        metrics: The metrics that are optimized.
    """

    search: str
    hparams: dict[str, bool | float | str]
    metrics: list[str]


class ProgressActor:
    """A Ray actor between a run's driver and its workers.

    Rank 0 reports progress and messages; the driver shows them. A worker that fails for a reason
    that no restart mends sets the abort reason. A search controls its trials' runs by it: a run
    asks before each epoch whether it may continue. The dashboard shows the owner: `run demo`.
    """

    def __init__(self, owner: str):
        self.owner, self._progress = owner, dict[str, Any]()
        self._messages: list[str] = []
        self._failures: list[str] = []
        self._abort_reason: str | None = None
        self._storage_failed = False
        self._reached_epoch, self._epoch_limit, self._stopped = -1, 0, False

    def __repr__(self) -> str:
        return f"{self.owner}: progress"

    def update(self, progress: dict[str, Any]) -> None:
        """Replace the progress."""
        self._progress = progress

    def add_message(self, text: str) -> None:
        """Add a line for the user."""
        self._messages.append(text)

    def add_failure(self, reason: str) -> None:
        """Record that a worker failed; Ray Train restarts all of them, or gives up."""
        if not self._abort_reason:
            self._failures.append(reason)
            self._messages.append(reason)

    def failures(self, start: int) -> list[str]:
        """The failures from index `start` on."""
        return self._failures[start:]

    def abort(self, reason: str, storage_failed: bool = False) -> None:
        """Set the reason why the run must not be restarted, unless one is set."""
        if not self._abort_reason:
            self._abort_reason, self._storage_failed = reason, storage_failed

    def abort_reason(self) -> str | None:
        """The reason why the run must not be restarted, if there is one."""
        return self._abort_reason

    def storage_failed(self) -> bool:
        """Whether that is storage that is full or fails: a search does not go on without it."""
        return self._storage_failed

    def state(self, start: int) -> tuple[dict[str, Any], list[str]]:
        """The progress, and the messages from index `start` on."""
        return self._progress, self._messages[start:]

    # For a search, which decides between epochs whether a trial's run continues.

    def set_epoch_limit(self, epochs: int) -> None:
        """Let the run train until it has so many epochs."""
        self._epoch_limit = epochs

    def stop(self) -> None:
        """Let the run train no further epoch."""
        self._stopped = True

    def may_continue(self, epochs: int) -> bool | None:
        """Whether a run of so many epochs trains another; None while that is undecided.

        All ranks ask after each epoch, and all get the same answer for it.
        """
        self._reached_epoch = max(self._reached_epoch, epochs)
        if epochs < self._epoch_limit:
            return True
        return False if self._stopped else None

    def reached_epoch(self) -> int:
        """The number of epochs after which the run last asked; -1 if it never has."""
        return self._reached_epoch


def start_progress_actor(owner: str) -> "ray.actor.ActorHandle[Any]":
    """Start the actor of a run on this node, as any other node may leave the cluster."""
    from cl_ray.training.resources import start_on_node

    return start_on_node(None, ProgressActor, owner)


def worker_failure_callback(actor: "ray.actor.ActorHandle[Any]") -> "ray.train.UserCallback":
    """Build a callback of Ray Train that reports to the actor why workers are restarted.

    Its class is local, so that Ray Train's controller gets it by value: a module that imports
    torch would delay the controller's start by seconds.
    """
    from ray.exceptions import RayActorError
    from ray.train import UserCallback

    from cl_ray.errors import UserError
    from cl_ray.training.ray_compat import failure_reason, raised_error, worker_error

    class WorkerFailureCallback(UserCallback):
        """Reports the workers that died; if none did, those that raised an error.

        The others of a group fail only because they miss the one that died. After a `UserError` no
        restart helps: an error of a callback has Ray Train end the run at once.
        """

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Any]) -> None:
            """Report the failures of a worker group, by rank."""
            errors = {rank: worker_error(error) for rank, error in worker_exceptions.items()}
            for error in map(raised_error, errors.values()):
                if isinstance(error, UserError):
                    raise error
            died = {r: e for r, e in errors.items() if isinstance(e, RayActorError)} or errors
            for rank, error in died.items():
                actor.add_failure.remote(f"worker {rank} is lost: {failure_reason(error)}")

    return WorkerFailureCallback()


class TrainingProgress:
    """Shows a run's progress and messages from a thread while the context is entered.

    In a terminal one line is replaced, else a line is printed at times.
    """

    def __init__(self, console: "Console", config: "Config", actor: "ray.actor.ActorHandle[Any]"):
        from rich.live import Live

        self.console, self.config, self.actor = console, config, actor
        self._live = Live(console=console, refresh_per_second=4, transient=True)
        self._printed, self._printed_at = "", 0.0
        self._last: dict[str, Any] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._poll, daemon=True)

    def __enter__(self) -> None:
        if self.console.is_terminal:
            self._live.start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join(timeout=5)
        if self.console.is_terminal:
            self._live.stop()

    def _poll(self) -> None:
        """Show what is new until the run is over, and once more."""
        import ray

        from cl_ray.console import print_line

        shown, last = 0, False
        while not last:
            last = self._over.wait(0.25)
            try:
                progress, messages = ray.get(self.actor.state.remote(shown), timeout=5)
            except Exception:  # as while Ray shuts down; the run does not depend on its display
                continue
            for message in messages:
                print_line(self.console, message)
            shown += len(messages)
            if progress and progress != self._last:
                self._show(progress)

    def _show(self, progress: dict[str, Any]) -> None:
        """Replace the progress line; the line of a finished epoch stays."""
        from rich.text import Text

        from cl_ray.console import print_line

        finished = self._last and progress["epoch"] > self._last["epoch"]
        self._last = progress
        line = self._line(progress)
        is_due = progress["speed"] and time.monotonic() - self._printed_at > LOG_EVERY
        if self.console.is_terminal and not finished:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif (finished or is_due) and line != self._printed:  # as that of an epoch's last step
            print_line(self.console, line)
            self._printed, self._printed_at = line, time.monotonic()

    def _line(self, progress: dict[str, Any]) -> str:
        """The progress as text: epoch, step, speed, metrics and remaining time."""
        done = progress["epoch"] + progress["position"] / progress["steps"]
        number = progress["epoch"] + (1 if progress["position"] else 0)
        epochs = self.config.epochs
        parts = [
            f"epoch {max(1, number)}/{epochs}",
            f"step {progress['step']:,}",
            f"{progress['speed']:,.0f} images/s",
        ]
        metrics = progress["metrics"]
        parts += [f"{SHOWN_METRICS[k]} {v:.3f}" for k, v in metrics.items() if k in SHOWN_METRICS]
        if progress["speed"]:
            images = progress["steps"] * self.config.batch_size * (epochs - done)
            parts.append(f"{format_duration(images / progress['speed'])} left")
        return "  ".join(parts)
