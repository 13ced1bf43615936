"""Whether workers fit, with a real Ray of a given number of CPUs and GPUs."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
from helpers.local_ray import local_ray
from helpers.refusal import error_of
from rich.console import Console

from cl_ray.config import build_config
from cl_ray.training.ray_session import ray_session
from cl_ray.training.resources import (
    InsufficientResourcesError,
    Shortage,
    WorkerResources,
    plan_workers,
)

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """A machine with 4 CPUs and 2 GPUs, by Ray's count."""
    with local_ray(cpus=4, gpus=2):
        yield


def plan(local: bool = True, **fields: Any) -> WorkerResources:
    return plan_workers(build_config({"batch_size": 120, **fields}), local)


def plan_error(local: bool = True, **fields: Any) -> str:
    return error_of(lambda: plan(local, **fields))


@pytest.mark.parametrize(
    ("workers", "cpus", "gpus"),
    [
        (1, 4, 1),
        (2, 2, 1),
        (3, 1, 0.5),  # a worker is never split over two GPUs
        ((1, 4), 1, 0.5),  # room for the most
    ],
)
def test_a_local_machine_is_divided_among_the_workers(
    workers: Any, cpus: float, gpus: float
) -> None:
    none: dict[str, Any] = {"every": 0}
    assert plan(workers=workers, evaluation=none) == WorkerResources(cpus, gpus, int(cpus), None)
    assert plan(workers=workers, device="cpu") == WorkerResources(cpus, 0, int(cpus), None)


@pytest.mark.parametrize(("workers", "cpus"), [(1, 3), (2, 1), (4, 1), ((1, 2), 2)])
def test_workers_on_gpus_leave_a_cpu_to_evaluations(workers: Any, cpus: float) -> None:
    """If each then has one of its own, and the number of workers is fixed."""
    assert plan(workers=workers).cpus == cpus


def test_a_gpu_that_is_named_must_be_asked_for() -> None:
    """On a cluster, where workers have none by default."""
    assert plan(False, device="cuda", gpus_per_worker=1).gpus == 1
    assert plan(device="cuda").gpus == 1
    assert plan_error(False, device="cuda") == (
        "device 'cuda' is for workers that have a GPU, and these have none: give "
        "--gpus-per-worker, or take device auto or cpu."
    )


def test_fractions_of_gpus_can_all_be_placed() -> None:
    """Six workers on two GPUs: rounding must leave none out."""
    ours = plan(workers=(1, 6), cpus_per_worker=0.5)
    assert ours.gpus == 0.3333
    group = ray.util.placement_group([ours.bundle] * 6)
    assert group.wait(120)
    ray.util.remove_placement_group(group)


def test_a_cluster_gives_only_what_is_requested() -> None:
    assert plan(local=False) == WorkerResources(1, 0, 1, None)
    assert plan(local=False, workers=4) == WorkerResources(1, 0, 1, None)
    assert plan(local=False, workers=2, gpus_per_worker=1, cpus_per_worker=2) == WorkerResources(
        2, 1, 2, None
    )
    assert plan(local=False, gpus_per_worker=0.25, workers=4) == WorkerResources(1, 0.25, 1, None)


def test_threads_are_the_cpus_rounded_down_or_as_requested() -> None:
    assert plan(cpus_per_worker=3.5).threads == 3
    assert plan(cpus_per_worker=0.5).threads == 1
    assert plan(cpus_per_worker=2, threads=7).threads == 7


def test_more_than_the_cluster_has() -> None:
    assert plan_error(workers=6) == (
        "workers 6 with 1 CPU each need 6 CPU; the cluster has 4: take --workers 4, or a smaller "
        "--cpus-per-worker."
    )
    assert plan_error(workers=6, batch_size=6) == (  # 4 do not divide it
        "workers 6 with 1 CPU each need 6 CPU; the cluster has 4: take --workers 3, or a smaller "
        "--cpus-per-worker."
    )
    assert plan_error(workers=2, cpus_per_worker=3) == (
        "workers 2 with 3 CPU each need 6 CPU; the cluster has 4: take --workers 1, or a smaller "
        "--cpus-per-worker."
    )
    assert plan_error(cpus_per_worker=5) == (
        "workers 1 with 5 CPU each need 5 CPU; the cluster has 4: take a smaller --cpus-per-worker."
    )
    assert plan_error(local=False, workers=3, gpus_per_worker=1) == (
        "workers 3 with 1 GPU each need 3 GPU; the cluster has 2: take --workers 2, or a smaller "
        "--gpus-per-worker."
    )
    # Of an elastic run, the least number must fit.
    assert plan(workers=(4, 6), local=False) == WorkerResources(1, 0, 1, None)
    assert "workers 5 with 1 CPU each need 5 CPU" in plan_error(workers=(5, 6), local=False)


def test_an_error_carries_what_is_missing_and_speaks_of_the_caller_s_unit() -> None:
    with pytest.raises(InsufficientResourcesError) as caught:
        plan(local=False, workers=3, gpus_per_worker=1)
    shortage = caught.value.shortage
    found = Shortage(3, 1, 1, "GPU", available=2, may_add=None, fits=2, batch_size=120)
    assert shortage == found
    error = InsufficientResourcesError(shortage, "concurrent 3 with", "--concurrent 2", "trial")
    assert str(error) == (
        "concurrent 3 with 1 GPU each need 3 GPU; the cluster has 2: take --concurrent 2, or a "
        "smaller --gpus-per-trial."
    )
    assert str(InsufficientResourcesError(shortage, "actors 3 with", None, "actor")).endswith(
        "the cluster has 2: take a smaller --gpus-per-actor."
    )


def test_a_sum_that_suffices_in_parts_that_do_not() -> None:
    assert plan_error(workers=3, gpus_per_worker=0.6) == (
        "workers 3 with 1 CPU and 0.6 GPU each do not fit: the cluster's nodes, 1 of them, have "
        "room for 2: take --workers 2, or give each less."
    )
    assert plan(workers=2, gpus_per_worker=0.6).gpus == 0.6


def test_a_ray_that_this_process_started_is_local() -> None:
    """As in a notebook that called `ray.init()` itself; it is left running."""
    with ray_session(None, False, False, Console(quiet=True)) as local:
        assert local
    assert ray.is_initialized()
