"""Whether an evaluation beside the training slows it: images/s during evaluations, and outside.

`python benchmarks/evaluation.py` needs two CPUs, of which the worker takes one and the evaluation
the other, and reads both speeds out of one run's curves.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits

EPOCHS = 4
IMAGES = {"train": 12_800, "test": 10_000}


def digits(folder: Path) -> str:
    """A data set of the first packaged digits, with labels and a split test."""
    packaged, splits = Dataset.open("mnist"), {}
    for split, count in IMAGES.items():
        rows = packaged.read(split, packaged.pieces(split)[:14])
        assert rows.label is not None
        images = zip(rows.image[:count], rows.label[:count], strict=True)
        splits[split] = [RawImage(image, int(label), "") for image, label in images]
    write_splits(splits, str(folder / "digits"), DatasetMetadata("digits", "MNIST"))
    return str(folder / "digits")


def main() -> None:
    """Print both speeds and their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "run"
        flags = ["--name=run", f"--storage={scratch}", f"--data={digits(Path(scratch))}"]
        often = [f"--epochs={EPOCHS}", "--evaluation.reference=mnist", "--cpus-per-worker=1"]
        train = [sys.executable, "-m", "cl_ray", "train", "--preset=quick"]
        subprocess.run([*train, *flags, *often], check=True, stdout=subprocess.DEVNULL)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        seconds = {x["step"]: x["evaluation/seconds"] for x in map(json.loads, lines)}
        events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        over = [(e.wall_time, seconds[e.step]) for e in events.Scalars("evaluation/frechet")]
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for record in events.Scalars("speed/images_per_second")[3:]:  # the first ones warm up
            during = any(end - long < record.wall_time < end for end, long in over)
            speeds[during].append(record.value)
    beside, alone = (statistics.median(speeds[during]) for during in (True, False))
    counts = f"{len(speeds[True])} and {len(speeds[False])} records"
    print(f"{beside:.0f} images/s during evaluations, {alone:.0f} outside: {beside / alone:.3f}")
    print(f"({counts}; an evaluation took {statistics.median(seconds.values()):.0f} s)")


if __name__ == "__main__":
    main()
