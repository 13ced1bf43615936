"""Readers of what a run has logged: metrics by epoch, curves by step, JSON records."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cl_ray.storage import RunStorage


@dataclass(frozen=True)
class MetricCurve:
    """A metric, [n], over the training steps, [n], increasing."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def thinned(self, most: int) -> "MetricCurve":
        """Return at most so many points, each the mean of its neighbours, at their last step."""
        if len(self.steps) <= most:
            return self
        parts = np.array_split(np.arange(len(self.steps)), most)
        means = np.array([self.values[part].mean() for part in parts])
        return MetricCurve(np.array([self.steps[part[-1]] for part in parts]), means)


def read_record(folder: RunStorage, file: str) -> dict[str, Any] | None:
    """Return a JSON object of the run; None if the file is missing or incomplete."""
    try:
        record = json.loads(folder.read(file) or b"null")
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_curves(folder: RunStorage) -> dict[str, MetricCurve]:
    """Return the finite points of each metric by step, from TensorBoard's events.

    A curve without any is left out.
    """
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    names = [name for name in folder.files("tensorboard") if "tfevents" in name]
    curves = {}
    with tempfile.TemporaryDirectory() as copies:
        for name in names:
            (Path(copies) / name).write_bytes(folder.read(f"tensorboard/{name}") or b"")
        events = EventAccumulator(copies, size_guidance={SCALARS: 0}).Reload()
        for tag in events.Tags()["scalars"]:
            points = sorted((e.step, e.value) for e in events.Scalars(tag) if np.isfinite(e.value))
            if points and not tag.startswith("epoch/"):
                steps, values = zip(*points, strict=True)
                curves[tag] = MetricCurve(np.array(steps, np.int64), np.array(values, np.float64))
    return curves
