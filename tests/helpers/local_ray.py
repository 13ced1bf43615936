"""Ray in the process of a test."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray


@contextmanager
def local_ray(cpus: int, gpus: int = 0, dashboard: bool = False, **options: Any) -> Iterator[Any]:
    """Start Ray with so many CPUs and GPUs, real or not; yield its context."""
    # Not in pytest's folder, whose path is too long for a socket.
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        context = ray.init(
            address="local", num_cpus=cpus, num_gpus=gpus, include_dashboard=dashboard,
            dashboard_port=0, log_to_driver=False, logging_level="ERROR", _temp_dir=folder,
            **options,
        )  # fmt: skip
        try:
            yield context
        finally:
            ray.shutdown()
