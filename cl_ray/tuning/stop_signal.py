"""What rings for the trials when the search is to end; its module imports nothing that is slow."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import ray
import ray.actor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

MOST = 100_000
"""Trials that may wait for the bell at once."""


class StopSignal:
    """Rings when the search is to end, and knows whom to wait for; a Ray actor."""

    def __init__(self, search: str):
        self.search = search
        self._ring = asyncio.Event()
        self._busy: set[int] = set()

    def __repr__(self) -> str:
        return f"cl_ray.Bell({self.search})"

    async def ring(self) -> None:
        """Have all trials save."""
        self._ring.set()

    async def rung(self) -> None:
        """Return when it rings."""
        await self._ring.wait()

    async def enter(self, trial: int) -> None:
        """A trial has begun to take steps, which would be lost."""
        self._busy.add(trial)

    async def leave(self, trial: int) -> None:
        """It has saved them."""
        self._busy.discard(trial)

    async def busy(self) -> list[int]:
        """Trials with steps that are not saved."""
        return sorted(self._busy)


def start_stop_signal(search: str) -> "ray.actor.ActorHandle[Any]":
    """A bell on this node: any other may leave the cluster, and the bell with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(num_cpus=0, max_concurrency=MOST, scheduling_strategy=here)(StopSignal)
    return kind.remote(search)


class StopListener:
    """A trial's ear for the bell; without one, it never rings.

    Args:
        bell: The search's.
    """

    def __init__(self, bell: "ray.actor.ActorHandle[Any] | None"):
        self.bell = bell
        self.rung: ray.ObjectRef[None] | None = None

    def hears(self) -> bool:
        """Whether it has rung while steps are taken; asks nobody."""
        return self.rung is not None and bool(ray.wait([self.rung], timeout=0)[0])

    @contextlib.contextmanager
    def steps(self, trial: int) -> Iterator[None]:
        """Steps are taken, and saved at the end.

        Only meanwhile does it listen: a process with a call of its own that has not returned ends
        neither by an error nor when Ray Tune asks it to, and the search would wait for ever.
        """
        if self.bell is None:
            yield
            return
        self.bell.enter.remote(trial)
        self.rung = self.bell.rung.remote()
        try:
            yield
        finally:
            ray.cancel(self.rung)
            self.rung = None
            self.bell.leave.remote(trial)

    def wait_for_the_end(self, trial: int) -> None:
        """The trial has saved; its process is ended."""
        assert self.bell is not None
        ray.get(self.bell.leave.remote(trial))
        threading.Event().wait()
