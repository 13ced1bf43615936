"""PyTorch's process group of a run.

Ray Train lets the workers find each other by PyTorch's `TCPStore`, which listens on all interfaces
and answers everybody. On one machine a file does the same, in a folder that only this user enters.
A single worker needs no group: its steps then have no collective operations.
"""

import os
import socket
import tempfile
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from ray.train.torch import TorchConfig

from cl_ray.cuda_graph import release_graphs
from cl_ray.training.ray_compat import on_loopback, session_log_dir

_RayTorchBackend: Any = TorchConfig().backend_cls


class ProcessGroupConfig(TorchConfig):
    """A `TorchConfig` for the workers of a run; by default NCCL if they have GPUs, else gloo."""

    @property
    def backend_cls(self) -> Any:
        """The class that sets up the process group."""
        return ProcessGroupBackend


class ProcessGroupBackend(_RayTorchBackend):
    """Ray Train's backend for PyTorch, with `FileStore` in place of `TCPStore` on one machine."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Set up the process group of a new group of workers, if there are several."""
        import ray

        if len(worker_group) == 1:
            return
        if not on_loopback():
            super().on_start(worker_group, backend_config)
            return
        gpus = worker_group.get_resources_per_worker().get("GPU", 0)
        backend = backend_config.backend or ("nccl" if gpus else "gloo")
        file = worker_group.execute_single(0, _new_store_file)
        shared = backend, file, len(worker_group), backend_config.timeout_s
        ray.get(
            [
                worker_group.execute_single_async(rank, _join_process_group, *shared, rank)
                for rank in range(len(worker_group))
            ]
        )

    def on_shutdown(self, worker_group: Any, backend_config: TorchConfig) -> None:
        """Destroy the process group, as at the end of a run or when the workers change."""
        worker_group.execute_async(release_graphs)  # each worker runs this before what follows
        super().on_shutdown(worker_group, backend_config)


def _new_store_file() -> str:
    """Return the path of a file that is not there yet, in a new folder of the Ray session."""
    logs = session_log_dir()
    return f"{tempfile.mkdtemp(prefix='process_group-', dir=logs and logs.parent)}/store"


def _join_process_group(backend: str, file: str, workers: int, timeout: int, rank: int) -> None:
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    for variable in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(variable, loopback)
    dist.init_process_group(
        backend,
        init_method=f"file://{file}",
        rank=rank,
        world_size=workers,
        timeout=timedelta(seconds=timeout),
    )
