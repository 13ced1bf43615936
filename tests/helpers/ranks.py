"""Real gloo process groups on the loopback: several ranks on this machine."""

import os
import socket
import tempfile
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing import get_context, start_processes

LIMIT = timedelta(seconds=90)
"""A rank that waits for another longer than this gives up."""
SLOW = ["cl_ray.checkpoint", "cl_ray.trainer", "safetensors.torch", "torch._dynamo"]
"""What takes seconds to import; torch._dynamo at an optimiser's first use."""


def together(function: Callable[..., Any], workers: int, *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each of `workers` ranks, in order of rank.

    The ranks meet in a file and talk over free ports. The function is a module's own.

    Raises:
        ProcessRaisedException: A rank failed; carries its traceback. The others are ended.
    """
    get_context("forkserver").set_forkserver_preload(SLOW)  # imported once, then forked
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _rank, (workers, folder, function, arguments), workers, start_method="forkserver"
        )
        return [torch.load(f"{folder}/{rank}.pt", weights_only=False) for rank in range(workers)]


def _rank(
    rank: int, workers: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ["GLOO_SOCKET_IFNAME"] = loopback
    dist.init_process_group(
        "gloo", f"file://{folder}/meeting", LIMIT, rank=rank, world_size=workers
    )
    torch.save(function(*arguments), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
