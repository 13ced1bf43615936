"""`cl-ray` in a process of its own and in this one, and the metrics that a run wrote."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cl_ray.cli import main
from helpers.small_run import SMALL_RUN


def cl_ray(
    *arguments: str, cwd: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end; its output has 200 columns."""
    return subprocess.run(
        [sys.executable, "-m", "cl_ray", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=900,
        env={**os.environ, "COLUMNS": "200", **environment},
    )


def run_flags(folder: Path, data: str) -> list[str]:
    """Flags of a small run of one epoch in a folder, on some data."""
    place = [f"--name={folder.name}", f"--storage={folder.parent}"]
    return [*place, f"--data={data}", "--epochs=1", *SMALL_RUN]


def train(folder: Path, data: str, *flags: str, **environment: str) -> str:
    """Train a small run to its end; return what it printed."""
    done = cl_ray("train", *run_flags(folder, data), *flags, cwd=None, **environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def train_here(folder: Path, data: str, *flags: str) -> str:
    """Train a small run to its end on the Ray of this process; return what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("COLUMNS", "200")
        main(["train", *run_flags(folder, data), *flags])
    return printed.getvalue()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Read the lines of metrics.jsonl, one for each epoch."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
