"""A Ray session: Ray started on this machine or a cluster joined, with the signals handled."""

import contextlib
import importlib
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console

from cl_ray.errors import UserError, first_error_line
from cl_ray.training.ray_compat import (
    configure_ray_environment,
    started_local_ray,
    untested_ray_warning,
)


def cluster_address(address: str | None) -> str | None:
    """The cluster to join: the given address or RAY_ADDRESS; None to start Ray here."""
    address = address or os.environ.get("RAY_ADDRESS")
    return None if address == "local" else address or None


@contextlib.contextmanager
def ray_session(
    address: str | None, dashboard: bool, verbose: bool, console: Console
) -> Iterator[bool]:
    """Start Ray or join a cluster, and shut down what was started.

    A Ray that this process is connected to already is used and left running. The arguments are
    those of `LaunchOptions`.

    Yields:
        Whether Ray runs on this machine for this process only.

    Raises:
        UserError: The cluster cannot be joined.
    """
    configure_ray_environment(dashboard)
    import ray

    warning = untested_ray_warning()
    if warning:
        console.print(warning, soft_wrap=True, highlight=False)
    if ray.is_initialized():
        yield started_local_ray()
        return
    address = cluster_address(address)
    level = logging.INFO if verbose else logging.ERROR
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    if address:
        try:
            ray.init(address=address, **options)
        except (ConnectionError, ValueError) as error:
            reason = first_error_line(error.__cause__ or error)
            raise UserError(f"Cannot join the Ray cluster {address}: {reason}.") from error
    else:
        console.print("Starting Ray on this machine …")
        # Ray's processes need seconds to start; torch, needed next, is imported meanwhile.
        threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
        context = ray.init(address="local", include_dashboard=dashboard, **options)
        if dashboard:
            console.print(f"Ray dashboard: http://{context.dashboard_url}")
    if not verbose:
        for name in ("ray.train", "ray.data", "ray"):
            logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with handle_signal(signal.SIGTERM, _interrupt):
            yield not address
    finally:
        ray.shutdown()


@contextlib.contextmanager
def handle_signal(
    number: signal.Signals, handler: Callable[..., Any] | None = None
) -> Iterator[None]:
    """Handle a signal by another function, if given, and restore the present handler at the end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python allows handlers only in the main thread
        return
    before = signal.getsignal(number)
    if handler:
        signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


def _interrupt(*signal_and_frame: Any) -> None:
    """Handle SIGTERM, which schedulers and `ray job stop` send, like Ctrl-C.

    Ray's own handler prints a traceback.
    """
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):  # ignored, as in a program that a script started with `&`
        raise KeyboardInterrupt
    handler(*signal_and_frame)
