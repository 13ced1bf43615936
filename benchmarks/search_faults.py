"""How many of ten searches hang, and what a search loses that is killed five times.

    python benchmarks/search_faults.py

Short ASHA searches, two trials at once, with one worker and with two, with and without the
dashboard and another Ray cluster on the machine. Then one search whose driver is killed with
SIGKILL at five random times: trials that are lost or trained twice, and epochs trained again.
"""

import json
import random
import subprocess
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import ray
from bare import CL_RAY
from rich.console import Console

SEARCH = [*CL_RAY, "tune"]
TRIALS, EPOCHS = 24, 4
"""Of the search that is killed: enough that it does not end before."""
LIMIT = 300.0
"""Seconds after which a search counts as hanging."""
SMALL = [
    *("--images=500", "--set=batch_size=32", "--set=threads=1", "--set=evaluation.samples=200"),
    *("--set=evaluation.images=200", "--set=log_every=5"),
]
SPACE = """
optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}
generator.width: {kind: int, low: 4, high: 8}
discriminator.width: {kind: int, low: 4, high: 8}
"""


def flags(folder: Path, name: str) -> list[str]:
    """Return the flags of all searches here."""
    space = folder / "space.yaml"
    space.write_text(SPACE)
    return [f"--storage={folder}", f"--name={name}", f"--space={space}", *SMALL]


def count_hangs(folder: Path, console: Console) -> None:
    """Run ten searches under every combination that matters."""
    hung = 0
    for number in range(10):
        dashboard, beside, workers = number % 2, number // 2 % 2, 1 + (number >= 6)
        if beside:
            ray.init(address="local", num_cpus=1, logging_level="ERROR", log_to_driver=False)
        started = time.perf_counter()
        command = [
            *(*SEARCH, *flags(folder, f"h{number}"), "--trials=4", "--epochs=2"),
            *("--scheduler=asha", "--concurrent=2", f"--workers={workers}"),
            *("--cpus-per-trial=1", "--dashboard" if dashboard else "--no-dashboard"),
        ]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT)
            ended = "ended" if done.returncode == 0 else f"failed: {done.stderr[-300:]}"
        except subprocess.TimeoutExpired:
            hung += 1
            ended = "HANGS"
        if beside:
            ray.shutdown()
        words = f"dashboard {bool(dashboard)}, another Ray {bool(beside)}, workers {workers}"
        console.print(f"{number}: {words}: {ended} after {time.perf_counter() - started:.0f} s")
    console.print(f"searches that hang: {hung} of 10")


def evaluated_epochs(folder: Path) -> dict[str, list[str]]:
    """Return the lines of metrics.jsonl of each trial's finished epochs."""
    return {
        file.parent.name: [line for line in file.read_text().splitlines() if '"evaluation/' in line]
        for file in folder.glob("trials/*/metrics.jsonl")
    }


def count_epochs(folder: Path) -> int:
    """Return the number of finished epochs of all trials."""
    return sum(map(len, evaluated_epochs(folder).values()))


def kill_driver(folder: Path, console: Console) -> None:
    """Kill the driver of a search five times."""
    rng = random.Random(0)
    search = folder / "k"
    start = [
        *(*SEARCH, *flags(folder, "k"), f"--trials={TRIALS}", f"--epochs={EPOCHS}"),
        *("--scheduler=none", "--concurrent=2"),
    ]
    resume = [*SEARCH, f"--storage={folder}", "--resume=k"]
    snapshots: list[dict[str, list[str]]] = []
    for number in range(5):
        process = subprocess.Popen(
            resume if snapshots else start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        started, known = time.monotonic(), count_epochs(search)
        while count_epochs(search) == known and time.monotonic() - started < LIMIT:
            time.sleep(0.1)  # until it trains again
        time.sleep(rng.uniform(0, 8))
        ended = process.poll()
        process.kill()
        process.wait()
        time.sleep(5)  # its processes follow it
        snapshots.append(evaluated_epochs(search))
        state = "killed" if ended is None else f"had ended with status {ended}"
        console.print(f"{state}, {number + 1}: {count_epochs(search)} epochs are finished")
    done = subprocess.run(resume, capture_output=True, text=True, timeout=2 * LIMIT)
    console.print(f"resumed to its end with status {done.returncode}{done.stderr[-300:]}")
    snapshots.append(evaluated_epochs(search))
    gone = [
        (len(before), sum(line not in after.get(trial, []) for line in before))
        for earlier, after in pairwise(snapshots)
        for trial, before in earlier.items()
    ]
    worst = max((n for had, n in gone if had < EPOCHS), default=0)
    rows = json.loads((search / "leaderboard.json").read_text())
    finished = {row["trial"] for row in rows if row["status"] == "finished"}
    console.print(
        f"{len(finished)} of {TRIALS} trials finished, {len(rows)} in the table; finished ones "
        f"lost or trained again {sum(n > 0 for had, n in gone if had == EPOCHS)}; finished epochs "
        f"that an unfinished one lost, at most {worst}"
    )


def main() -> None:
    console = Console(soft_wrap=True, highlight=False)
    with tempfile.TemporaryDirectory() as scratch:
        kill_driver(Path(scratch), console)
        count_hangs(Path(scratch), console)


if __name__ == "__main__":
    main()
