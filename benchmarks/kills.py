"""Kill a run at random moments, resume it, and compare it with one that was never killed.

    python benchmarks/kills.py 40                # SIGKILL: driver, worker, all processes
    python benchmarks/kills.py 20 --power-cuts   # all processes, and what was not synced is lost

After each kill the run must go on from the newest checkpoint that was complete, and in the end all
weights, optimizers and metrics must be the same, byte for byte. A run is killed four times, and in
one of three cases as soon as it begins to save. For a power cut the folder is rebuilt from what was
synced, by `tests/helpers/synced_disk.py`.
"""

import contextlib
import os
import random
import re
import shutil
import signal
import subprocess
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro
from bare import CL_RAY
from helpers.commands import read_metrics
from helpers.datasets import mnist, write_images
from helpers.processes import children, is_alive, wait_for
from helpers.small_run import SMALL_RUN
from helpers.states import states_equal
from helpers.synced_disk import cut_power, record_all

from cl_ray.checkpoint import CheckpointStore
from cl_ray.storage import RunStorage

TESTS = Path(__file__).parents[1] / "tests"
KILLS_OF_A_RUN = 4
EPOCHS, IMAGES = 20, 640
STEPS = EPOCHS * IMAGES // 32
RECORDER = """
from pathlib import Path
from helpers.synced_disk import record
record(Path({root!r}), Path({log!r}))
"""
"""A `sitecustomize` that has each process write down what it syncs."""


@dataclass
class Run:
    """A run that is killed again and again.

    Args:
        folder: Its folder, in a folder of its own.
        expected: The least step that it must resume from after each kill.
        kinds: What was killed, and whether it was saving.
    """

    folder: Path
    data: Path
    workers: int
    environment: dict[str, str]
    expected: list[int] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)
    output: str = ""

    def start(self) -> "subprocess.Popen[str]":
        """Start the run, or resume it."""
        place = [f"--name={self.folder.name}", f"--storage={self.folder.parent}"]
        small = [*SMALL_RUN, "--checkpoint.every=5", "--evaluation.every=0", "--max-failures=99"]
        more = [f"--data={self.data}", f"--epochs={EPOCHS}", f"--workers={self.workers}"]
        return subprocess.Popen(
            [*CL_RAY, "train", *place, *small, *more], env={**os.environ, **self.environment},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def newest(self) -> int:
        """The step of the newest complete checkpoint; 0 if there is none."""
        found = self.folder.glob("checkpoints/step-*/manifest.json")
        return max((int(file.parent.name.removeprefix("step-")) for file in found), default=0)

    def is_saving(self) -> bool:
        """Whether a checkpoint is begun and not complete."""
        folders = self.folder.glob("checkpoints/step-*")
        return any(not (folder / "manifest.json").exists() for folder in folders)

    def result(self) -> dict[str, Any]:
        """The last checkpoint, and the metrics of each epoch, without names and times."""
        store = CheckpointStore(*RunStorage.from_uri(self.folder).open())
        newest = store.newest()
        if newest is None:
            return {}
        epochs = {f"metrics of epoch {line['epoch']}": line for line in read_metrics(self.folder)}
        for line in epochs.values():
            for time_dependent in ("seconds", "images_per_second", "data_time_fraction"):
                line.pop(time_dependent, None)
        state = store.load(newest.name)
        del state["config"]
        return {**state, **epochs}


def differences(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """The names of the parts of two results that are not equal, every tensor to its last bit."""
    names = {**ours, **theirs}
    return [name for name in names if not states_equal(ours.get(name), theirs.get(name))]


def kill_once(run: Run, process: "subprocess.Popen[str]", goal: int, kind: str) -> None:
    """Kill a run after a step, at a random moment or as it begins to save."""
    goal = max(goal, 10 + (run.expected[-1] if run.expected else 0))  # it has resumed
    wait_for(lambda: run.newest() >= goal or process.poll() is not None, "steps", pause=0.005)
    time.sleep(0.4)  # the driver has printed it
    if random.random() < 1 / 3:
        wait_for(lambda: run.is_saving() or process.poll() is not None, "saving", pause=0)
        time.sleep(random.uniform(0, 0.02))
    else:
        time.sleep(random.uniform(0, 0.5))
    found = list(children(process.pid))
    workers = [pid for pid, title in found if "RayTrainWorker" in title]
    victims = {
        "driver": [process.pid],
        "worker": random.sample(workers, min(1, len(workers))),
        "all": [process.pid, *(pid for pid, _ in found)],
    }[kind]
    for pid in victims:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.kinds.append(f"{kind}{', saving' if run.is_saving() else ''}")
    if kind == "all":  # none of them writes any more
        wait_for(lambda: not any(map(is_alive, victims[1:])), "the end of all processes")
    run.expected.append(run.newest())


def kill_run(run: Run, kills: int, log: Path | None) -> list[str]:
    """Kill a run so many times, let it end, and return what went wrong."""
    process = run.start()
    for number in range(kills):
        goal = int(STEPS * (number + random.random()) / (kills + 1))
        kind = "all" if log else random.choice(["driver", "worker", "all"])
        kill_once(run, process, goal, kind)
        if kind == "worker":  # Ray Train starts it again
            continue
        run.output += process.communicate()[0]
        if log:
            lose_what_was_not_synced(run, log)
        process = run.start()
    run.output += process.communicate()[0]
    resumed = [int(step) for step in re.findall(r"resumes from step-(\d+)", run.output)]
    faults = [] if process.returncode == 0 else [run.output[-2000:]]
    if len(resumed) != kills or any(a < b for a, b in zip(resumed, run.expected, strict=False)):
        faults.append(f"resumed from {resumed}, and complete were {run.expected}")
    return faults


def lose_what_was_not_synced(run: Run, log: Path) -> None:
    """Replace the run's storage by what a power cut leaves of it."""
    storage, left = run.folder.parent, run.folder.parent.with_name("left")
    cut_power(storage, log, left, random.randrange(2**31))
    shutil.rmtree(storage)
    shutil.rmtree(log)
    left.rename(storage)
    record_all(storage, log)


def main(
    kills: Annotated[int, tyro.conf.Positional] = 40,
    power_cuts: bool = False,
    workers: int = 1,
    seed: int = 0,
) -> None:
    """Print the faults of each run, and their number.

    Args:
        kills: How many, in runs of four.
        power_cuts: Lose what was not synced.
        workers: Of each run.
        seed: Of the moments.
    """
    random.seed(seed)
    wrong = 0
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(scratch, "digits")
        write_images(data, train=mnist("train", IMAGES))
        whole = Run(Path(scratch, "whole", "run"), data, workers, {})
        whole.output = whole.start().communicate()[0]
        expected = whole.result()
        for number in range(-(-kills // KILLS_OF_A_RUN)):
            storage, log = Path(scratch, f"runs{number}"), Path(scratch, f"log{number}")
            storage.mkdir()
            environment = {}
            if power_cuts:
                hook = Path(scratch, "hook")
                hook.mkdir(exist_ok=True)
                text = RECORDER.format(root=str(storage), log=str(log))
                (hook / "sitecustomize.py").write_text(text)
                environment["PYTHONPATH"] = f"{hook}:{TESTS}"
            run = Run(storage / "run", data, workers, environment)
            left = min(KILLS_OF_A_RUN, kills - number * KILLS_OF_A_RUN)
            faults = kill_run(run, left, log if power_cuts else None)
            if differ := differences(expected, run.result()):
                faults.append(f"other {', '.join(differ)}")
            wrong += bool(faults)
            found = " ".join(faults) or "the same"
            print(f"run {number}: {'; '.join(run.kinds)}: {found}", flush=True)
    print(f"{kills} kills, {wrong} runs with finished work lost or a byte different")


if __name__ == "__main__":
    tyro.cli(main)
