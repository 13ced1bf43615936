"""A Ray that is started here: what its processes get of the machine, and an untested version."""

import os
import subprocess
import sys

import pytest
from rich.console import Console

from cl_ray.errors import UserError
from cl_ray.training.ray_session import ray_session

SCRIPT = """
import os
import ray
from rich.console import Console
from cl_ray.training.ray_session import ray_session

def seen():
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.nice(0)

with ray_session(None, False, False, Console(quiet=True)):
    given = [ray.remote(num_cpus=1, num_gpus=gpus)(seen).remote() for gpus in (0, 1, 0.5)]
    print([gpus for gpus, nice in ray.get(given)])
    print({nice for gpus, nice in ray.get(given)} == {os.nice(0)})
"""


@pytest.mark.ray
def test_a_process_sees_the_gpus_that_it_was_given_and_is_as_nice_as_its_starter() -> None:
    """One GPU by Ray's count, which a driver's runtime would show to everybody."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120,
        env={**environment, "CUDA_VISIBLE_DEVICES": "3", "RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'},
    )  # fmt: skip
    assert done.stdout == "['', '3', '3']\nTrue\n", done.stderr


@pytest.mark.parametrize(("version", "tested"), [("2.60.3", True), ("2.70.0", False)])
def test_an_untested_version_of_ray_prints_one_line(
    version: str, tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.__version__", version)
    console = Console(width=300)
    with (
        console.capture() as printed,
        pytest.raises(UserError, match="Cannot join"),
        ray_session("?", False, False, console),
    ):
        pass
    warning = f"Ray {version} is not tested with cl_ray: the tested version is 2.60.\n"
    assert printed.get() == ("" if tested else warning)
