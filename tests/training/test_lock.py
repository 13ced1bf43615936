"""A folder that one process writes is refused to another, until that ends, by whatever."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import children
from helpers.small_run import SMALL_RUN

from cl_ray.errors import UserError
from cl_ray.storage import RunStorage
from cl_ray.training.preflight import exclusive_lock

HOLD = """
import sys
from cl_ray.training.preflight import alone
from cl_ray.storage import Folder
with alone(Folder.of(sys.argv[1]), "search"):
    print("held", flush=True)
    sys.stdin.read()
"""


def refused(folder: RunStorage, holder: int) -> str:
    return (
        f"The run {folder} runs in another process (process {holder} on {socket.gethostname()}): "
        "wait for it or end it, or take another --name."
    )


def test_a_run_is_refused_to_a_second_process_until_the_first_is_killed(
    make_digits: Any, tmp_path: Path
) -> None:
    command = [
        sys.executable, "-m", "cl_ray", "train", "--name=demo", f"--storage={tmp_path}",
        f"--data={make_digits(200)}", "--epochs=100000", "--evaluation.every=0", *SMALL_RUN,
    ]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert first.stdout is not None
    assert first.stdout.readline().startswith("Starting Ray")
    while not any("raylet" in title for _, title in children(first.pid)):
        assert first.poll() is None
        time.sleep(0.2)
    theirs = [pid for pid, _ in children(first.pid)]
    folder = RunStorage.at(str(tmp_path), "demo")
    try:
        again = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert again.returncode == 1
        assert again.stderr == f"cl-ray: {refused(folder, first.pid)}\n"
        assert again.stdout == ""  # no Ray was started
        assert first.poll() is None
        first.kill()
        first.wait()
        # Ray's processes, which outlive it, hold nothing.
        with exclusive_lock(folder, "run"):
            assert (tmp_path / "demo/.lock").read_text().startswith(f"process {os.getpid()} on")
    finally:
        for pid in (first.pid, *theirs):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        first.communicate()


@pytest.mark.parametrize("remote", [False, True])
def test_whose_process_holds_it(remote: bool, bucket: Any, tmp_path: Path) -> None:
    """In a bucket as well, by processes of one machine, whatever keys they give."""
    uri = bucket.uri("held/s", user="me:pass@") if remote else str(tmp_path)
    theirs = RunStorage.from_uri(uri)
    ours = RunStorage.from_uri(bucket.uri("held/s")) if remote else theirs
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, uri], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(UserError) as caught, exclusive_lock(ours, "run"):
        pass
    assert str(caught.value) == refused(ours, holder.pid)
    holder.communicate()
    with exclusive_lock(ours, "run"), pytest.raises(UserError), exclusive_lock(theirs, "run"):
        pass
