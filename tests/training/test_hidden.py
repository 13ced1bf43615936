"""What processes of a Ray that is started here see of the machine's GPUs."""

import os
import subprocess
import sys

SCRIPT = """
import os
import ray
from rich.console import Console
from cl_ray.training.cluster import running_ray

def seen():
    return os.environ.get("CUDA_VISIBLE_DEVICES")

with running_ray(None, False, False, Console(quiet=True)):
    given = [ray.remote(num_cpus=1, num_gpus=gpus)(seen).remote() for gpus in (0, 1, 0.5)]
    print(ray.get(given))
"""


def test_a_process_sees_the_gpus_that_it_was_given_and_no_other() -> None:
    """One GPU by Ray's count, which a driver's runtime would show to everybody."""
    environment = {name: v for name, v in os.environ.items() if "ACCEL_ENV_VAR" not in name}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120,
        env={**environment, "CUDA_VISIBLE_DEVICES": "3", "RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'},
    )  # fmt: skip
    assert done.stdout == "['', '3', '3']\n", done.stderr
