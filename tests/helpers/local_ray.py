"""Ray in the process of a test, and in one of its own."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from cl_ray.training.ray_compat import RAY_ENVIRONMENT, configure_ray_environment
from cl_ray.training.ray_session import start_local_ray
from helpers.node_start import PYTHONPATH


@contextmanager
def local_ray(cpus: int, gpus: int = 0, **options: Any) -> Iterator[Any]:
    """Start Ray with so many CPUs and GPUs, real or not; yield its context.

    Its environment is that of a Ray that cl_ray starts. At Ray's own niceness its workers would
    wait for all that other processes of the tests compute.
    """
    configure_ray_environment(dashboard=False)
    # Not in pytest's folder, whose path is too long for a socket.
    temporary = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    with temporary as folder, ExitStack() as stack:
        context = start_local_ray(
            stack, Path(folder), print, num_cpus=cpus, num_gpus=gpus, include_dashboard=False,
            log_to_driver=False, logging_level="ERROR", **options,
        )  # fmt: skip
        try:
            yield context
        finally:
            ray.shutdown()


@contextmanager
def cluster_head(*cpus: int, **environment: str) -> Iterator[str]:
    """Start a cluster, see head.py, with more nodes of so many CPUs; yield its address."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("head.py")), *map(str, cpus)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, **RAY_ENVIRONMENT, **environment, "PYTHONPATH": PYTHONPATH},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        assert address, "the cluster did not start: its error is on stderr"
        yield address
    finally:
        process.communicate()  # the end of its input is the end of it
