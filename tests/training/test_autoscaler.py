"""A cluster with an autoscaler: a run waits for nodes that may come, and is refused if none may.

The cluster is a head without a CPU, and its nodes are processes on this machine.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.commands import train
from helpers.node_start import PYTHONPATH
from helpers.processes import wait_for
from rich.console import Console

from cl_ray.config import build_config
from cl_ray.errors import UserError
from cl_ray.inference.actor_pool import ActorPool, allocate_actors
from cl_ray.training.ray_session import ray_session
from cl_ray.training.resources import (
    UNKNOWN_AUTOSCALER,
    Autoscaler,
    InsufficientResourcesError,
    WorkerResources,
    find_autoscaler,
    max_capacity,
    plan_workers,
)
from cl_ray.tuning.runner import allocate_trials
from cl_ray.tuning.search import prepare_search

pytestmark = pytest.mark.ray
HEAD = Path(__file__).parents[1] / "helpers" / "autoscaled.py"
CONFIG = {
    "max_workers": 3,
    "available_node_types": {
        "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
        "small": {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 3},
        "large": {
            "resources": {"CPU": 6, "GPU": 4}, "node_config": {}, "min_workers": 0, "max_workers": 2
        },
    },
}  # fmt: skip
FOUND = Autoscaler((({"CPU": 0}, 0), ({"CPU": 1}, 3), ({"CPU": 6, "GPU": 4}, 2)), 3)


class Head:
    """A cluster's head in a process of its own; see autoscaled.py."""

    def __init__(self, version: str):
        environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "PYTHONPATH": PYTHONPATH}
        self.process = subprocess.Popen(
            [sys.executable, str(HEAD), version, json.dumps(CONFIG)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        self.address = self.answer()

    def answer(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line, "the head has ended: its error is on stderr"
        return line

    def send(self, line: str) -> None:
        assert self.process.stdin is not None
        print(line, file=self.process.stdin, flush=True)
        assert self.answer() == "done"


@pytest.fixture(scope="module", params=[pytest.param("1", marks=pytest.mark.slow), "2"])
def head(request: pytest.FixtureRequest) -> Iterator[Head]:
    """The head of a cluster whose autoscaler of version 1 or 2 is started on request."""
    head = Head(request.param)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("RAY_AUTH_MODE", "disabled")
            ray.init(address=head.address, log_to_driver=False, logging_level="ERROR")
            yield head
    finally:
        ray.shutdown()
        # An earlier ray.init() has set it; if it is unset, the next one sets it again.
        os.environ.pop("RAY_AUTH_MODE", None)
        head.process.communicate()  # the end of its input is the end of it


def plan(**fields: Any) -> WorkerResources:
    return plan_workers(build_config({"batch_size": 120, **fields}), local=False)


def plan_error(**fields: Any) -> str:
    with pytest.raises(InsufficientResourcesError) as caught:
        plan(**fields)
    return str(caught.value)


def test_the_capacity_that_an_autoscaler_may_reach() -> None:
    """The largest nodes first, up to the limits of each type and of all."""

    def capacity(autoscaler: Autoscaler, kind: str = "CPU") -> float:
        return max_capacity(lambda node: node.get(kind, 0), [], autoscaler)

    assert capacity(FOUND) == 6 + 6 + 1
    assert capacity(FOUND, "GPU") == 4 + 4
    assert capacity(Autoscaler((({"CPU": 2}, 2), ({}, 1), ({"CPU": 9}, 0)), 2)) == float("inf")
    assert capacity(Autoscaler((({"CPU": 2}, 2), ({}, 0)), 9)) == 4
    assert capacity(UNKNOWN_AUTOSCALER) == float("inf")
    own_machines, up = Autoscaler((({}, 2),), 2), [{"CPU": 4.0}, {"CPU": 4.0}]  # all are up
    assert max_capacity(lambda node: node["CPU"], up, own_machines) == 8


@pytest.fixture(scope="module")
def searched(make_digits: Any, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A search of 16 trials with a GPU each."""
    measured = (f"--set=evaluation.{field}" for field in ("samples=60", "images=60"))
    return [
        f"--data={make_digits(300)}", f"--storage={tmp_path_factory.mktemp('searches')}",
        "--trials=16", "--gpus-per-trial=1", "--set=evaluation.reference=mnist", *measured,
    ]  # fmt: skip


def test_no_autoscaler_then_one_with_unknown_limits_then_one_with_known_ones(
    head: Head, searched: list[str]
) -> None:
    search = prepare_search(searched, "search")

    with ray_session(None, False, False, Console(quiet=True)) as local:
        assert not local  # joined, not started here

    assert find_autoscaler() is None
    assert plan_error() == (
        "workers 1 with 1 CPU each need 1 CPU; the cluster has 0: take a smaller --cpus-per-worker."
    )
    head.send("external")
    assert wait_for(find_autoscaler, "the autoscaler", pause=0.5) == UNKNOWN_AUTOSCALER
    assert plan(workers=40, gpus_per_worker=1).waits_for == (
        "40 CPU and 40 GPU from the autoscaler, whose limit is not known here"
    )
    assert str(allocate_trials(search, local=False)) == (
        "1 trial at a time, 1 CPU and 1 GPU each; --concurrent asks the autoscaler for more"
    )
    pool = allocate_actors(None, None, 1, local=False, num_parts=99)
    assert str(pool) == ("1 actor, 1 CPU and 1 GPU each; --actors asks the autoscaler for more")
    assert allocate_actors(5, None, 1, local=False, num_parts=99) == ActorPool(5, 1, 1)
    head.send("end")
    head.send("bootstrap")
    assert find_autoscaler() == FOUND
    assert plan(workers=2).waits_for == "2 CPU, which the autoscaler may add"
    assert plan(workers=8, gpus_per_worker=1).waits_for == (
        "8 CPU and 8 GPU, which the autoscaler may add"
    )
    # As many as fit: the most that the autoscaler may bring the cluster to.
    resources = allocate_trials(search, local=False)
    assert str(resources) == "8 trials at once, 1 CPU and 1 GPU each"
    assert resources.each.waits_for == "8 CPU and 8 GPU, which the autoscaler may add"
    wide = prepare_search([*searched, "--workers=2"], "search")
    assert allocate_trials(wide, local=False).concurrent == 6  # of 2 machines with 6 CPUs each
    assert allocate_actors(None, None, 1, local=False, num_parts=99) == ActorPool(8, 1, 1)
    assert allocate_actors(None, None, None, local=False, num_parts=99) == ActorPool(13, 1, 0)
    assert allocate_actors(None, None, None, local=False, num_parts=7) == ActorPool(7, 1, 0)
    with pytest.raises(UserError, match="An actor of 7 CPU fits no node of the cluster"):
        allocate_actors(None, 7, None, local=False, num_parts=99)
    assert plan_error(workers=15) == (
        "workers 15 with 1 CPU each need 15 CPU; the cluster has 0 and its autoscaler may add 13: "
        "take --workers 12, or a smaller --cpus-per-worker."  # which divide the batch
    )
    assert plan_error(workers=10, gpus_per_worker=1) == (
        "workers 10 with 1 GPU each need 10 GPU; the cluster has 0 and its autoscaler may add 8: "
        "take --workers 8, or a smaller --gpus-per-worker."
    )
    assert plan_error(workers=3, cpus_per_worker=4) == (
        "workers 3 with 4 CPU each do not fit: the cluster's nodes, 1 of them, have room for 0, "
        "with those that its autoscaler may add for 2: take --workers 2, or give each less."
    )
    assert plan_error(cpus_per_worker=7) == (
        "workers 1 with 7 CPU each do not fit: the cluster's nodes, 1 of them, have room for 0, "
        "with those that its autoscaler may add for 0: give each less."
    )


@pytest.mark.parametrize("head", ["2"], indirect=True)  # of the version that `ray up` starts
def test_a_run_waits_for_its_node(head: Head, make_digits: Any, tmp_path: Path) -> None:
    printed = train(tmp_path / "demo", make_digits(100), RAY_ADDRESS=head.address)
    assert "Waiting for 1 CPU, which the autoscaler may add.\n" in printed
    summary = json.loads((tmp_path / "demo" / "summary.json").read_text())
    assert (summary["status"], summary["workers"]) == ("finished", 1)
    nodes = [node for node in ray.nodes() if node["Alive"]]
    assert sorted(node["Resources"].get("CPU", 0) for node in nodes) == [0, 1]
    assert plan() == WorkerResources(1, 0, 1, None)
