"""Where the workers leave word for the command that started them."""

from typing import Any


class ProgressActor:
    """What rank 0 says of its progress, and what must not be tried again; a Ray actor."""

    def __init__(self, run: str):
        self.run, self._progress = run, dict[str, Any]()
        self._notes: list[str] = []
        self._losses: list[str] = []
        self._fatal: str | None = None
        self._reached, self._allowed, self._over = -1, 0, False
        self._to_save = self._saved = False

    def __repr__(self) -> str:
        return f"cl_ray.Board({self.run})"

    def put(self, progress: dict[str, Any]) -> bool:
        """Replace the progress; whether the run is to save and wait for its end."""
        self._progress = progress
        return self._to_save

    def note(self, text: str) -> None:
        """Leave a line for the user."""
        self._notes.append(text)

    def lost(self, why: str) -> None:
        """Say that a worker is lost and why; Ray Train starts all of them again, or gives up."""
        if not self._fatal:
            self._losses.append(why)
            self._notes.append(why)

    def losses(self, seen: int) -> list[str]:
        """What was said of lost workers from the `seen`-th on."""
        return self._losses[seen:]

    def stop(self, reason: str) -> None:
        """Say why the run is over: a user's mistake, or a loss that is no number."""
        self._fatal = self._fatal or reason

    def fatal(self) -> str | None:
        """Why the run is over, if it is."""
        return self._fatal

    def look(self, seen: int) -> tuple[dict[str, Any], list[str]]:
        """The progress, and the notes from the `seen`-th on."""
        return self._progress, self._notes[seen:]

    # A gate before each epoch, for a host that decides between epochs whether to go on.

    def allow(self, epochs: int) -> None:
        """Let the run train until it has so many epochs."""
        self._allowed = epochs

    def end(self) -> None:
        """Let it train no epoch more."""
        self._over = True

    def save(self) -> bool:
        """Have it save within the epoch and wait for its end; whether it has."""
        self._to_save = True
        return self._saved

    def saved(self) -> None:
        """It has saved."""
        self._saved = True

    def passes(self, epochs: int) -> bool | None:
        """Whether a run of so many epochs trains another; None while nothing is decided.

        All ranks ask after each epoch, and each hears the same of it.
        """
        self._reached = max(self._reached, epochs)
        if epochs < self._allowed:
            return True
        return False if self._over else None

    def reached(self) -> int:
        """Epochs after which the run last asked; -1 before it has."""
        return self._reached
