"""metrics.jsonl, a line of JSON for each epoch of a run: its only reader and its only writer."""

import json
from typing import Any

from cl_ray.errors import UserError
from cl_ray.storage import RunStorage

_FILE = "metrics.jsonl"


def read_epochs(folder: RunStorage) -> list[dict[str, Any]]:
    """Return the lines of a run in the order of the epochs.

    Raises:
        UserError: A line is not one of these.
    """
    lines = {}
    for number, row in enumerate((folder.read(_FILE) or b"").split(b"\n"), 1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
            epoch, _ = int(line["epoch"]), int(line["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"The run's log is damaged: line {number} of {folder}/{_FILE} is not a JSON object "
                "with epoch and step; correct or delete that line."
            ) from error
        lines[epoch] = line
    return [lines[epoch] for epoch in sorted(lines)]


class MetricsFile:
    """Writes the lines of a run, of which it keeps those of finished epochs.

    The file is replaced at once, so that a kill leaves the old lines or the new ones: a thousand
    epochs are a megabyte.

    Args:
        folder: The run folder.
        epochs: Finished epochs; lines of later ones are dropped.

    Raises:
        UserError: As `read_epochs`.
    """

    def __init__(self, folder: RunStorage, epochs: int):
        self.folder = folder
        found = read_epochs(folder)
        self.lines = [line for line in found if line["epoch"] <= epochs]
        if self.lines != found:
            self._write()

    def add(self, epoch: int, step: int, metrics: dict[str, Any]) -> None:
        """Add metrics to the line of an epoch, or as a new line."""
        line = next((line for line in self.lines if line["epoch"] == epoch), None)
        if line is None:
            self.lines.append(line := {"epoch": epoch, "step": step})
        line |= metrics
        self._write()

    def _write(self) -> None:
        self.folder.write(_FILE, "".join(f"{json.dumps(line)}\n" for line in self.lines).encode())
