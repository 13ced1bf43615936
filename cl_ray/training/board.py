"""Where the workers leave word for the command that started them."""

from typing import Any


class Board:
    """What rank 0 says of its progress, and what must not be tried again; a Ray actor."""

    def __init__(self, run: str):
        self.run, self._progress = run, dict[str, Any]()
        self._notes: list[str] = []
        self._fatal: str | None = None

    def __repr__(self) -> str:
        return f"cl_ray.Board({self.run})"

    def put(self, progress: dict[str, Any]) -> None:
        """Replace the progress."""
        self._progress = progress

    def note(self, text: str) -> None:
        """Leave a line for the user."""
        self._notes.append(text)

    def stop(self, reason: str) -> None:
        """Say why the run is over: a user's mistake, or a loss that is no number."""
        self._fatal = self._fatal or reason

    def fatal(self) -> str | None:
        """Why the run is over, if it is."""
        return self._fatal

    def look(self, seen: int) -> tuple[dict[str, Any], list[str]]:
        """The progress, and the notes from the `seen`-th on."""
        return self._progress, self._notes[seen:]
