"""What processes of a Ray that is started here get of the machine: GPUs, and its CPUs' time."""

import os
import subprocess
import sys

SCRIPT = """
import os
import ray
from rich.console import Console
from cl_ray.training.cluster import running_ray

def seen():
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.nice(0)

with running_ray(None, False, False, Console(quiet=True)):
    given = [ray.remote(num_cpus=1, num_gpus=gpus)(seen).remote() for gpus in (0, 1, 0.5)]
    print([gpus for gpus, nice in ray.get(given)])
    print({nice for gpus, nice in ray.get(given)} == {os.nice(0)})
"""


def test_a_process_sees_the_gpus_that_it_was_given_and_is_as_nice_as_its_starter() -> None:
    """One GPU by Ray's count, which a driver's runtime would show to everybody."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120,
        env={**environment, "CUDA_VISIBLE_DEVICES": "3", "RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'},
    )  # fmt: skip
    assert done.stdout == "['', '3', '3']\nTrue\n", done.stderr
