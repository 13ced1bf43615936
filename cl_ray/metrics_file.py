"""metrics.jsonl, a line of JSON for each epoch of a run: its only reader and its only writer."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cl_ray.errors import UserError
from cl_ray.storage import RunStorage

PART_EPOCHS = 20
"""Epochs in a file on an object store, where a file can only be sent again whole."""

_FIRST = "metrics.jsonl"
_FILES = re.compile(r"metrics(-\d+)?\.jsonl")


def read_epochs(folder: RunStorage, note: Callable[[str], object] = print) -> list[dict[str, Any]]:
    """Return the lines of a run in the order of the epochs.

    A last line that is cut is left out: it is still being written, or the process or the machine
    went down meanwhile, which may also leave bytes of 0 at the end of the file.

    Args:
        folder: The run folder.
        note: Called with a sentence on a line that is left out.

    Raises:
        UserError: Another line is not one of these.
    """
    return _parse_files(folder, _read_files(folder), note)


class MetricsFile:
    """Writes the lines of a run, of which it keeps those of finished epochs.

    In a local folder a line is appended; any other change replaces the file at once, so that a kill
    leaves the old lines or the new ones. On an object store the first `PART_EPOCHS` epochs are in
    metrics.jsonl and later ones in files such as metrics-00021.jsonl, so that what an epoch sends
    does not grow with the run.

    Args:
        folder: The run folder.
        epochs: Finished epochs; lines of later ones are dropped.
        note: As in `read_epochs`.

    Raises:
        UserError: As `read_epochs`.
    """

    def __init__(self, folder: RunStorage, epochs: int, note: Callable[[str], object] = print):
        self.folder = folder
        self._files = _read_files(folder)
        lines = _parse_files(folder, self._files, note)
        self.lines = [line for line in lines if line["epoch"] <= epochs]
        self._write()

    def add(self, epoch: int, step: int, metrics: dict[str, Any]) -> None:
        """Add metrics to the line of an epoch, or as a new line."""
        line = next((line for line in self.lines if line["epoch"] == epoch), None)
        if line is None:
            self.lines.append(line := {"epoch": epoch, "step": step})
        line |= metrics
        self._write()

    def _write(self) -> None:
        """Write the files whose content changes, then delete those without a line."""
        new = {_FIRST: b""}
        for line in self.lines:
            part = (line["epoch"] - 1) // PART_EPOCHS if self.folder.remote else 0
            name = f"metrics-{part * PART_EPOCHS + 1:05d}.jsonl" if part else _FIRST
            new[name] = new.get(name, b"") + json.dumps(line).encode() + b"\n"
        for name, blob in reversed(new.items()):  # lines move from the first file to later ones
            old = self._files.get(name, b"")
            if blob == old:
                continue
            if not self.folder.remote and old and blob.startswith(old):
                self.folder.check_lease()
                _append(Path(self.folder.uri, name), blob[len(old) :])
            else:
                self.folder.write(name, blob)
        for name in self._files.keys() - new.keys():
            self.folder.delete(name)
        self._files = new


def _append(path: Path, blob: bytes) -> None:
    with path.open("ab") as file:
        file.write(blob)
        file.flush()
        os.fsync(file.fileno())


def _read_files(folder: RunStorage) -> dict[str, bytes]:
    """Read the files with lines, by name, in the order of the epochs."""
    names = filter(_FILES.fullmatch, folder.files())
    ours = sorted(names, key=lambda name: (name != _FIRST, name))
    return {name: folder.read(name) or b"" for name in ours}


def _parse_files(
    folder: RunStorage, files: dict[str, bytes], note: Callable[[str], object]
) -> list[dict[str, Any]]:
    rows = [
        (f"line {number} of {folder}/{name}", row)
        for name, blob in files.items()
        for number, row in enumerate(blob.split(b"\n"), 1)
        if row.strip()
    ]
    lines = {}
    for place, row in rows:
        try:
            line = json.loads(row.rstrip(b"\0"))
            epoch, _ = int(line["epoch"]), int(line["step"])
        except (ValueError, KeyError, TypeError) as error:
            if (place, row) != rows[-1]:
                raise UserError(
                    f"The run's log is damaged: {place} is not a JSON object with epoch and step; "
                    "correct or delete that line."
                ) from error
            note(f"The last line, {place}, is incomplete and left out.")
        else:
            lines[epoch] = line
    return [lines[epoch] for epoch in sorted(lines)]
