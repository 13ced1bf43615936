"""What a killed process reserved on the cluster is given back, and nothing else."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import ray
from helpers.machine import machine
from ray.util.placement_group import placement_group

from cl_ray.tuning.orphaned_placement_groups import OrphanedPlacementGroups, find_orphans


@pytest.fixture
def four_cpus() -> Iterator[None]:
    with machine(cpus=4):
        yield


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_only_what_the_dead_reserved_is_given_back(four_cpus: None) -> None:
    @ray.remote(num_cpus=0)
    class Maker:
        def reserve(self, lifetime: str | None = None) -> str:
            group = placement_group([{"CPU": 1}], lifetime=lifetime)
            assert group.wait(30)
            return str(group.id.hex())

    dead, alive = Maker.remote(), Maker.remote()
    kept = {
        placement_group([{"CPU": 1}]).id.hex(),
        ray.get(alive.reserve.remote()),
        ray.get(dead.reserve.remote("detached")),
    }
    lost = ray.get(dead.reserve.remote())
    assert find_orphans() == []
    ray.kill(dead)
    wait_for(find_orphans)
    assert [group.id.hex() for group in find_orphans()] == [lost]
    OrphanedPlacementGroups().on_step_begin(0, [])
    wait_for(lambda: not find_orphans())
    table = ray.util.placement_group_table()
    assert {key for key, group in table.items() if group["state"] != "REMOVED"} == kept
    wait_for(lambda: ray.available_resources().get("CPU") == 1)
