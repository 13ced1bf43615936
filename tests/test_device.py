"""Which cores torch's threads may use, as the system itself says."""

import os
import threading

import pytest
import torch

from cl_ray.device import CpuAffinity, thread_ids

CORES = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
pytestmark = pytest.mark.skipif(len(CORES) < 2, reason="Linux's, of several cores")


def places(threads: int) -> tuple[list[set[int]], list[set[int]]]:
    """The cores of a computing thread and its helpers: within, and then after."""
    found: list[list[set[int]]] = []

    def compute() -> None:
        before = thread_ids()
        cores = CpuAffinity(threads)

        def look() -> None:
            torch.ones(threads << 16).add_(1)
            mine = {threading.get_native_id(), *(thread_ids() - before)}
            found.append([os.sched_getaffinity(thread) for thread in sorted(mine)])

        for _ in range(2):
            with cores:
                look()
        look()

    thread = threading.Thread(target=compute)
    thread.start()
    thread.join()
    torch.set_num_threads(1)
    assert found[0] == found[1]
    return found[0], found[2]


def test_each_thread_has_a_core_of_its_own_and_gives_it_back() -> None:
    within, after = places(len(CORES))
    assert sorted(map(list, within)) == [[core] for core in sorted(CORES)]
    assert after == [CORES, *within[1:]]


@pytest.mark.parametrize("threads", [1, len(CORES) + 1])
def test_fewer_or_more_threads_than_cores_go_where_they_like(threads: int) -> None:
    within, after = places(threads)
    assert within == after == [CORES] * threads
