"""Whether an evaluation beside the training slows it: images/s during evaluations, and outside.

`python benchmarks/evaluation.py` needs two CPUs, one for the worker and one for the evaluation
actor, and reads both speeds from the curves of one run.
"""

import statistics
import subprocess
import tempfile
from pathlib import Path

from bare import CL_RAY
from helpers.datasets import mnist, write_images
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_ray.metrics_file import read_epochs
from cl_ray.storage import RunStorage

EPOCHS = 4
IMAGES = {"train": 12_800, "validation": 5_000}
WARMUP_RECORDS = 3


def main() -> None:
    """Print both speeds and their ratio."""
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        train, validation = (mnist(split, count) for split, count in IMAGES.items())
        data = write_images(Path(scratch, "digits"), train=train, validation=validation)
        command = [*CL_RAY, "train", "--preset=quick", "--name=run"]
        command += [f"--storage={scratch}", f"--data={data}", f"--epochs={EPOCHS}"]
        command += ["--evaluation.reference=mnist", "--cpus-per-worker=1"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        lines = read_epochs(RunStorage.from_uri(run))
        seconds = {line["step"]: line["evaluation/seconds"] for line in lines}
        events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0})
        events.Reload()
        ends = [(e.wall_time, seconds[e.step]) for e in events.Scalars("evaluation/frechet")]
        speeds: dict[bool, list[float]] = {True: [], False: []}
        for record in events.Scalars("speed/images_per_second")[WARMUP_RECORDS:]:
            during = any(end - duration < record.wall_time < end for end, duration in ends)
            speeds[during].append(record.value)
    beside, outside = (statistics.median(speeds[during]) for during in (True, False))
    counts = f"{len(speeds[True])} and {len(speeds[False])} records"
    print(
        f"{beside:.0f} images/s during evaluations, {outside:.0f} outside: {beside / outside:.3f}"
    )
    print(f"({counts}; an evaluation took {statistics.median(seconds.values()):.0f} s)")


if __name__ == "__main__":
    main()
