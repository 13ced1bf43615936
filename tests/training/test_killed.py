"""A run on S3 whose machine goes away in mid-epoch: what the bucket holds of it."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from helpers.processes import children
from helpers.small_run import SMALL_RUN
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

STEPS = -(-60_000 // 32)


def test_the_curves_before_a_checkpoint_are_there(bucket: Any, tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "cl_ray", "train", "--name=demo", f"--storage={bucket.uri('killed')}",
        "--data=mnist", "--epochs=1", "--checkpoint.every=20", "--evaluation.every=0", *SMALL_RUN,
    ]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while not (found := saved(bucket)):
            assert running.poll() is None
            time.sleep(0.1)
    finally:
        for pid in (*(pid for pid, _ in children(running.pid)), running.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        running.wait()
    found = saved(bucket)
    assert 0 < max(found) < STEPS  # in mid-epoch
    events = bucket.files("killed/demo/tensorboard/")
    for name, blob in events.items():
        (tmp_path / name).write_bytes(blob)
    read = EventAccumulator(str(tmp_path), size_guidance={"scalars": 0}).Reload()
    steps = [event.step for event in read.Scalars("speed/images_per_second")]
    assert set(range(5, max(found) + 1, 5)) <= set(steps)


def saved(bucket: Any) -> list[int]:
    """The steps after which there are whole checkpoints."""
    found = bucket.client.list_objects_v2(Bucket="bucket", Prefix="killed/demo/checkpoints/")
    keys = [item["Key"] for item in found.get("Contents", [])]
    return [int(step[1]) for key in keys if (step := re.search(r"step-(\d+)/manifest.json", key))]
