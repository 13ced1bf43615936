"""A core for each thread of a step, where there are as many threads as cores."""

import os

import torch


class CpuAffinity:
    """While it is entered, each thread that torch computes with keeps to a core of its own.

    The threads wait for each other thousands of times a step. Beside another busy program Linux
    lets two of them share a core all the same, and each then waits until the other's turn is over:
    steps become tens of times slower (benchmarks/README.md, "Beside another program"). Nothing is
    done where the threads are fewer or more than the cores, or the system knows no such request.

    Args:
        threads: That torch computes with from here on. Made in the thread that enters, before that
            computes: its first computation starts the others.
    """

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self.cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        helpers = start_thread_pool(threads) if 1 < threads == len(self.cores) else []
        self.placed = len(helpers) == threads - 1 > 0
        if self.placed:
            try:
                for helper, core in zip(helpers, self.cores[1:], strict=True):
                    os.sched_setaffinity(helper, [core])
            except OSError:  # a sandbox that forbids it; training goes on as the system likes
                self.placed = False

    def __enter__(self) -> None:
        if self.placed:
            os.sched_setaffinity(0, self.cores[:1])

    def __exit__(self, *_: object) -> None:
        if self.placed:  # threads that this one starts elsewhere would keep to its one core
            os.sched_setaffinity(0, self.cores)


def start_thread_pool(threads: int) -> list[int]:
    """The threads that this one computes with, by the numbers that the system gives them."""
    before = all_thread_ids()
    torch.ones(threads << 16).add_(1)  # torch gives each at least 32,768 numbers
    return sorted(all_thread_ids() - before)


def all_thread_ids() -> set[int]:
    """Those of this process."""
    return {int(number) for number in os.listdir("/proc/self/task")}
