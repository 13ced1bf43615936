"""Worker processes of a local Ray start by our script, with the variables that they are given."""

import json
import os
import sys
from typing import Any

import pytest
import ray
from helpers.local_ray import local_ray
from helpers.processes import children

from cl_ray.training import setup_worker
from cl_ray.training.setup_worker import CONTEXT, LANGUAGE, worker_command

PROGRAM = ["default_worker.py", "--node-ip-address=127.0.0.1"]


def arguments(language: str = "PYTHON", **context: Any) -> list[str]:
    return [*PROGRAM, f"{LANGUAGE}{language}", f"{CONTEXT}{json.dumps(context)}"]


def test_variables_alone_are_set_here() -> None:
    given = arguments(env_vars={"A": "1"}, py_executable=sys.executable, command_prefix=[])
    assert worker_command(given) == (PROGRAM, {"A": "1"})
    assert worker_command([*PROGRAM, f"{LANGUAGE}PYTHON"]) == (PROGRAM, {})


@pytest.mark.parametrize(
    "given",
    [
        arguments(command_prefix=["nice"]),
        arguments(py_executable="/usr/bin/python3"),
        arguments(env_vars={"A": "${HOME}/a"}),
        arguments("JAVA"),
    ],
    ids=["prefix", "python", "reference", "java"],
)
def test_all_else_is_left_to_ray(given: list[str]) -> None:
    (script, *rest), variables = worker_command(given)
    assert script.endswith("ray/_private/workers/setup_worker.py")
    assert os.path.isfile(script)
    assert (rest, variables) == (given, {})


@pytest.mark.ray
def test_a_local_ray_starts_its_workers_by_it() -> None:
    def read(name: str) -> str | None:
        return os.environ.get(name)

    with local_ray(cpus=1):
        (raylet,) = [line for _, line in children(os.getpid()) if "/raylet " in line[:999]]
        assert f"{sys.executable} {setup_worker.__file__} " in raylet
        for value, expected in {"1": "1", "${LANG_}b": "b"}.items():
            options = {"runtime_env": {"env_vars": {"A": value}}}
            task = ray.remote(read).options(**options)
            assert ray.get(task.remote("A"), timeout=300) == expected
