"""What a run wrote down: its metrics an epoch, its curves by step, its pictures."""

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs
from numpy.typing import NDArray

from cl_ray.storage import RunStorage


@dataclass(frozen=True)
class MetricCurve:
    """A figure over the steps.

    Args:
        steps: [n] int64, rising.
        values: [n] float64.
    """

    steps: NDArray[np.int64]
    values: NDArray[np.float64]

    def thinned(self, most: int) -> "MetricCurve":
        """At most so many points, each the mean of its neighbours, at the last one's step."""
        if len(self.steps) <= most:
            return self
        parts = np.array_split(np.arange(len(self.steps)), most)
        means = np.array([self.values[part].mean() for part in parts])
        return MetricCurve(np.array([self.steps[part[-1]] for part in parts]), means)


def listing(folder: RunStorage, within: str) -> list[str]:
    """The names of the files in a folder of the run, sorted; none if it is not there."""
    filesystem, path = folder.open()
    selector = pyarrow.fs.FileSelector(f"{path}/{within}", allow_not_found=True)
    found = filesystem.get_file_info(selector)
    return sorted(i.base_name for i in found if i.type == pyarrow.fs.FileType.File)


def read_record(folder: RunStorage, file: str) -> dict[str, Any] | None:
    """What a JSON file of the run says; None where there is none, or not a whole one."""
    try:
        said = json.loads(folder.read(file) or b"null")
    except ValueError:
        return None
    return said if isinstance(said, dict) else None


def read_epochs(folder: RunStorage) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without a last one that is still being written."""
    lines = []
    for line in (folder.read("metrics.jsonl") or b"").decode(errors="replace").splitlines():
        try:
            lines.append(dict(json.loads(line)))
        except ValueError:
            break
    return lines


def read_curves(folder: RunStorage, lines: list[dict[str, Any]]) -> dict[str, MetricCurve]:
    """Each figure by step, out of TensorBoard's events; those of evaluations are by epoch.

    Args:
        folder: The run folder.
        lines: What `epochs` returned: a point an epoch where there are no events.
    """
    names = [name for name in listing(folder, "tensorboard") if "tfevents" in name]
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
    """What of the points is a number; a name with none is left out."""
    found = {}
    for name, pairs in points.items():
        good = sorted(pair for pair in pairs if np.isfinite(pair[1]))
        if good:
            steps, values = zip(*good, strict=True)
            found[name] = MetricCurve(np.array(steps, np.int64), np.array(values, np.float64))
    return found
