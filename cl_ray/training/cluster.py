"""Ray itself: started or joined, quiet, and whether its machines share a folder."""

import contextlib
import importlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

from rich.console import Console

from cl_ray.errors import UserError, first_error_line
from cl_ray.storage import RunStorage
from cl_ray.training.signals import handle_signal


def cluster_to_join(address: str | None) -> str | None:
    """The address that was given, else RAY_ADDRESS's; None where Ray is to be started here."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


@contextlib.contextmanager
def ray_session(
    address: str | None, dashboard: bool, verbose: bool, console: Console
) -> Iterator[bool]:
    """Ray, started or joined, quiet unless asked; yields whether it is this machine's own."""
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.1")
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    # Of a Ray started here, a worker is worth as much as any other program: at Ray's own niceness
    # of 15 one busy program on one of two cores slows a run of two threads by more than ten times.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # And a process that is given no GPU sees none.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    if dashboard:
        os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")
    import ray

    if ray.is_initialized():
        node = ray._private.worker._global_node  # None where Ray is reached through its client
        yield node is not None and node.ray_init_cluster  # started here by ray.init(), not joined
        return
    address = cluster_to_join(address)
    level = logging.INFO if verbose else logging.ERROR
    quiet: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    if address:
        try:
            ray.init(address=address, **quiet)
        except (ConnectionError, ValueError) as error:
            reason = first_error_line(error.__cause__ or error)
            raise UserError(f"There is no joining the Ray cluster {address}: {reason}.") from error
    else:
        console.print("Starting Ray on this machine …")
        # Ray's processes take their time to come up; torch, needed next, is imported meanwhile.
        threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
        context = ray.init(address="local", include_dashboard=dashboard, **quiet)
        if dashboard:
            console.print(f"Ray dashboard: http://{context.dashboard_url}")
    if not verbose:
        for name in ("ray.train", "ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with handle_signal(signal.SIGTERM, _as_ctrl_c):
            yield not address
    finally:
        ray.shutdown()


def _as_ctrl_c(*signal_and_frame: Any) -> None:
    """What schedulers and `ray job stop` end a program by; Ray's own answer is a stack of calls."""
    heeded = signal.getsignal(signal.SIGINT)  # whoever answers Ctrl-C by now
    if not callable(heeded):  # ignored, as in a program that a script left behind with `&`
        raise KeyboardInterrupt
    heeded(*signal_and_frame)


def check_shared_storage(folder: RunStorage, flag: str = "storage") -> None:
    """Refuse a local path on several machines, of which one does not see what is written here.

    Args:
        folder: Where this machine can write.
        flag: What the path was given as.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2:
        return

    mark = Path(folder.uri) / f".seen-{uuid4().hex}"  # no older run has left one of that name

    def sees() -> bool:
        return mark.exists()

    look = ray.remote(num_cpus=0)(sees)
    mark.touch()
    try:
        answers = ray.get(
            [
                look.options(
                    scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
                ).remote()
                for node in nodes
            ]
        )
    finally:
        mark.unlink()
    blind = [n["NodeManagerHostname"] for n, seen in zip(nodes, answers, strict=True) if not seen]
    if blind:
        raise UserError(
            f"{flag} {folder.storage!r} is not shared: {', '.join(blind)} cannot see it; give "
            f"--{flag} s3://..., gs://... or a path that every machine mounts."
        )
