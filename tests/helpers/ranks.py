"""Run a function on several ranks: real process groups on the loopback interface."""

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context
from torch.multiprocessing.spawn import start_processes

from cl_ray.cuda_graph import release_graphs

LIMIT = timedelta(seconds=90)
"""Timeout of a rank that waits for another."""
SLOW = ["cl_ray.checkpoint", "cl_ray.trainer", "safetensors.torch", "torch._dynamo"]
"""Modules that take seconds to import; torch._dynamo at an optimizer's first use."""


def run_on_ranks(
    function: Callable[..., Any], workers: int, *arguments: Any, backend: str = "gloo"
) -> list[Any]:
    """Call `function(*arguments)`, a module-level function, on each rank; return all results.

    Raises:
        ProcessRaisedException: A rank failed; carries its traceback.
    """
    get_context("forkserver").set_forkserver_preload(SLOW)  # imported once, then forked
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _rank,
            (workers, backend, folder, function, arguments),
            workers,
            start_method="forkserver",
        )
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(workers)]


def _rank(
    rank: int,
    workers: int,
    backend: str,
    folder: str,
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    torch.set_num_threads(1)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    dist.init_process_group(
        backend, f"file://{folder}/meeting", LIMIT, rank=rank, world_size=workers
    )
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    release_graphs()
    dist.destroy_process_group()
