"""PyTorch's process group of a run.

Ray Train lets the workers find each other by PyTorch's `TCPStore`, which listens on all interfaces
and answers everybody. On one machine a file does the same, in a folder that only this user enters.
A single worker needs no group: its steps then have no collective operations.

Ray Train's controller imports this module before it starts the workers, so torch is imported where
it is used: that is seconds of a run's start.
"""

import os
import socket
import tempfile
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from ray.train.backend import Backend, BackendConfig

from cl_ray.training.ray_compat import on_loopback, session_log_dir, torch_framework

SHUTDOWN_TIMEOUT = 30
"""Seconds that workers have to leave their group: one that is lost keeps the others waiting."""


@dataclass
class ProcessGroupConfig(BackendConfig):
    """Ray Train's `TorchConfig` for the workers of a run, which is imported without torch.

    Args:
        backend: By default NCCL if the workers have GPUs, else gloo.
    """

    backend: str | None = None
    init_method: str = "env"
    timeout_s: int = 1800

    @property
    def backend_cls(self) -> Any:
        """The class that sets up the process group."""
        return ProcessGroupBackend

    @property
    def train_func_context(self) -> Any:
        """What Ray Train runs a worker's loop in."""
        from ray.train.torch import TorchConfig

        return TorchConfig().train_func_context

    @property
    def framework(self) -> Any:
        """What the dashboard shows as the framework."""
        return torch_framework()

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, which the dashboard shows."""
        return {"backend": self.backend, "timeout_s": self.timeout_s}


class ProcessGroupBackend(Backend):
    """Ray Train's backend for PyTorch, with `FileStore` in place of `TCPStore` on one machine."""

    share_cuda_visible_devices = True

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        """Set up the process group of a new group of workers, if there are several."""
        import ray

        if len(worker_group) == 1:
            return
        if not on_loopback():
            from ray.train.torch import TorchConfig

            TorchConfig().backend_cls().on_start(worker_group, backend_config)
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

    def on_shutdown(self, worker_group: Any, backend_config: Any) -> None:
        """Destroy the process group, as at the end of a run or when the workers change."""
        import ray

        left = worker_group.execute_async(_leave_process_group)
        ray.wait(left, num_returns=len(left), timeout=SHUTDOWN_TIMEOUT)


def _new_store_file() -> str:
    """Return the path of a file that is not there yet, in a new folder of the Ray session."""
    logs = session_log_dir()
    return f"{tempfile.mkdtemp(prefix='process_group-', dir=logs and logs.parent)}/store"


def _join_process_group(backend: str, file: str, workers: int, timeout: int, rank: int) -> None:
    import torch.distributed as dist

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


def _leave_process_group() -> None:
    import torch.distributed as dist

    from cl_ray.cuda_graph import release_graphs

    release_graphs()  # NCCL waits for them
    if dist.is_initialized():
        dist.destroy_process_group()
