"""The signal that tells running trials to save and stop.

The actor's process imports this module, so it imports nothing that is slow, such as torch.
"""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray
import ray.actor

_MAX_WAITING = 100_000
"""Trials that may wait for the signal at once."""


class StopSignal:
    """A Ray actor that holds the signal, and knows which trials have steps that are not saved."""

    def __init__(self, search: str):
        self.search = search
        self._event = asyncio.Event()
        self._unsaved: set[int] = set()

    def __repr__(self) -> str:
        return f"search {self.search}: has the trials save on Ctrl-C"

    async def set(self) -> None:
        """Tell all trials to save and stop."""
        self._event.set()

    async def wait(self) -> None:
        """Return when the signal is set."""
        await self._event.wait()

    async def mark_unsaved(self, trial: int) -> None:
        """Record that a trial takes steps, which a stop now would lose."""
        self._unsaved.add(trial)

    async def mark_saved(self, trial: int) -> None:
        """Record that a trial has saved its steps."""
        self._unsaved.discard(trial)

    async def unsaved(self) -> list[int]:
        """Return the trials with steps that are not saved."""
        return sorted(self._unsaved)


def start_stop_signal(search: str) -> "ray.actor.ActorHandle[Any]":
    """Start the actor on this node: another node may leave the cluster, and the actor with it."""
    from cl_ray.training.resources import start_on_node

    return start_on_node(None, StopSignal, search, max_concurrency=_MAX_WAITING)


class StopListener:
    """A trial's side of the search's `StopSignal`; None is never set."""

    def __init__(self, signal: "ray.actor.ActorHandle[Any] | None"):
        self.signal = signal
        self._waiting: ray.ObjectRef[None] | None = None

    def is_set(self) -> bool:
        """Return whether the signal was set during these steps; makes no remote call."""
        return self._waiting is not None and bool(ray.wait([self._waiting], timeout=0)[0])

    @contextlib.contextmanager
    def unsaved_steps(self, trial: int) -> Iterator[None]:
        """Listen to the signal while a trial takes steps, which are saved at the end.

        It listens only meanwhile: a process with a pending call of its own ends neither by an
        error nor when Ray Tune asks it to, and the search would wait forever.
        """
        if self.signal is None:
            yield
            return
        self.signal.mark_unsaved.remote(trial)
        self._waiting = self.signal.wait.remote()
        try:
            yield
        finally:
            ray.cancel(self._waiting)
            self._waiting = None
            self.signal.mark_saved.remote(trial)

    def report_saved_and_wait(self, trial: int) -> None:
        """Report that the trial has saved; wait until the driver ends this process."""
        assert self.signal is not None
        ray.get(self.signal.mark_saved.remote(trial))
        threading.Event().wait()
