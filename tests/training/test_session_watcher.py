"""What a local Ray leaves is killed when its driver is, and nothing else."""

import os
import subprocess
import sys
import time
from pathlib import Path

from helpers.processes import children, is_alive, wait_for

DRIVER = """
import os, subprocess, sys, time
from pathlib import Path
from cl_ray.training.session_watcher import session_watcher
folder = Path(sys.argv[1])
with session_watcher(folder):
    ours = folder / f"session_2026-01-01_00-00-00_000000_{os.getpid()}" / "logs"
    theirs = folder / f"session_2026-01-01_00-00-00_000000_{os.getpid()}1" / "logs"
    child = [sys.executable, "-c", "import time; time.sleep(100)"]
    for logs in (ours, theirs):
        logs.mkdir(parents=True)
        log = (logs / "worker.out").open("w")
        print(subprocess.Popen(child, stdout=log, start_new_session=True).pid)
    log = (ours / "worker.out").open()
    print(subprocess.Popen(child, stdin=log, stdout=-3, start_new_session=True).pid, flush=True)
    own = (ours / "driver.log").open("w")
    if sys.argv[2:]:
        time.sleep(100)
print("alive", flush=True)
"""


def start(folder: Path, *flags: str) -> tuple[subprocess.Popen[str], int, list[int]]:
    """Start a driver; return it, a process of its session, one of another's, and one that reads."""
    command = [sys.executable, "-c", DRIVER, str(folder), *flags]
    driver = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert driver.stdout is not None
    ours, *others = (int(driver.stdout.readline()) for _ in range(3))
    return driver, ours, others


def test_processes_of_a_killed_driver_are_killed(tmp_path: Path) -> None:
    driver, ours, others = start(tmp_path, "stay")
    try:
        (watcher,) = [pid for pid, line in children(driver.pid) if "session_watcher.py" in line]
        time.sleep(0.3)
        assert is_alive(ours)
        os.killpg(driver.pid, 9)  # the watcher is in no group of the driver's
        wait_for(lambda: not is_alive(watcher), "the end of the watcher")
        wait_for(lambda: not is_alive(ours), "the end of the worker")
        assert all(map(is_alive, others))
    finally:
        for pid in others:
            os.kill(pid, 9)
        driver.communicate()


def test_at_the_end_of_the_context_they_are_killed_and_the_driver_stays(tmp_path: Path) -> None:
    driver, ours, others = start(tmp_path)
    try:
        output, _ = driver.communicate(timeout=60)
        assert output == "alive\n"
        assert driver.returncode == 0
        wait_for(lambda: not is_alive(ours), "the end of the worker")
        assert all(map(is_alive, others))
    finally:
        for pid in others:
            os.kill(pid, 9)
