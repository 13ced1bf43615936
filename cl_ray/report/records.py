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


def read_curves(folder: RunStorage, lines: list[dict[str, Any]]) -> dict[str, MetricCurve]:
    """Return each metric by step, from TensorBoard's events, else from lines of metrics.jsonl."""
    names = [name for name in folder.files("tensorboard") if "tfevents" in name]
    found = _events(folder, names) if names else {}
    if found:
        return found
    keys = {key for line in lines for key in line if "/" in key} | {"images_per_second"}
    return _curves(
        {
            "speed/images_per_second" if key == "images_per_second" else key: [
                (line["step"], line[key]) for line in lines if key in line
            ]
            for key in sorted(keys)
        }
    )


def _events(folder: RunStorage, names: list[str]) -> dict[str, MetricCurve]:
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    with tempfile.TemporaryDirectory() as copies:
        for name in names:
            (Path(copies) / name).write_bytes(folder.read(f"tensorboard/{name}") or b"")
        events = EventAccumulator(copies, size_guidance={SCALARS: 0}).Reload()
        tags = [tag for tag in events.Tags()["scalars"] if not tag.startswith("epoch/")]
        return _curves({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags})


def _curves(points: dict[str, list[tuple[int, float]]]) -> dict[str, MetricCurve]:
    """Return the finite points of each curve; a curve without any is left out."""
    found = {}
    for name, pairs in points.items():
        finite = sorted(pair for pair in pairs if np.isfinite(pair[1]))
        if finite:
            steps, values = zip(*finite, strict=True)
            found[name] = MetricCurve(np.array(steps, np.int64), np.array(values, np.float64))
    return found
