"""A machine as Ray sees it, of this process's own."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


@contextmanager
def machine(cpus: int, gpus: int = 0, dashboard: bool = False) -> Iterator[Any]:
    """Ray with so many CPUs and GPUs, whether they are there or not; yields its context."""
    # Not in pytest's own folder: its path is too long for a socket's.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        context = ray.init(
            address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=dashboard,
            dashboard_port=0, log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
        )  # fmt: skip
        try:
            yield context
        finally:
            ray.shutdown()
