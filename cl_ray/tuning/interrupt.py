"""Ctrl-C: trials under way save where they are, and the search ends within seconds.

Ray Tune's own answer waits until every trial has finished its epoch. Here a bell rings for the
trials instead: each saves at its next record of steps and waits for its end. The driver waits for
them, not for long, and takes Ray down.
"""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import ray
import ray.actor
from ray.tune import Callback

from cl_ray.training.signals import handle_signal

PATIENCE = 10.0
"""Seconds that trials may take to save; one that needs longer goes on from its last checkpoint."""


class Interrupted(KeyboardInterrupt):
    """The search was stopped by Ctrl-C, and its trials have saved."""


class InterruptCallback(Callback):
    """Has a search end where Ray Tune asks its callbacks, which it does ten times a second.

    Args:
        bell: The search's.
        say: Prints a line.
    """

    def __init__(self, bell: "ray.actor.ActorHandle[Any]", say: Callable[[str], None]):
        self.bell, self.say = bell, say
        self.asked = threading.Event()

    def heeded(self) -> AbstractContextManager[None]:
        """The first Ctrl-C is noted; one more is as ever, and ends the search at once."""
        before = signal.getsignal(signal.SIGINT)

        def note(*_: Any) -> None:
            signal.signal(signal.SIGINT, before)
            self.asked.set()

        return handle_signal(signal.SIGINT, note)

    def on_step_begin(self, iteration: int, trials: list[Any], **_: Any) -> None:
        """Ray Tune is about to look after its trials.

        Raises:
            Interrupted: Ctrl-C was pressed; what the trials did is saved.
        """
        if not self.asked.is_set():
            return
        self.say("Stopping: the trials under way save where they are (Ctrl-C again: at once).")
        ray.get(self.bell.ring.remote())
        end = time.monotonic() + PATIENCE
        while (busy := ray.get(self.bell.busy.remote())) and time.monotonic() < end:
            time.sleep(0.05)
        if busy:
            names = ", ".join(map(str, busy))
            self.say(
                f"Not saved within {PATIENCE:g} s, back to the last checkpoint: trial {names}."
            )
        raise Interrupted

    def __reduce__(self) -> Any:
        """Ray Tune pickles a search's callbacks for a restoring that is not used."""
        return Callback, ()
