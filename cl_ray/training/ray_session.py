"""A Ray session: Ray started on this machine or a cluster joined, with the signals handled."""

import contextlib
import importlib
import logging
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from cl_ray.console import print_line
from cl_ray.environment import usable_cpus
from cl_ray.errors import UserError, first_error_line
from cl_ray.signals import hangup_blocked, termination_as_interrupt
from cl_ray.training import ray_compat
from cl_ray.training.auth_token import prepare_token, token_file
from cl_ray.training.machine import check_local_ray, private_temp_folder, ray_temp_folder
from cl_ray.training.session_watcher import session_watcher

_GCS_ADDRESS = "HOST:PORT of its head's GCS (HOST:6379)"
_CONNECT_TIMEOUT = 5.0
"""Seconds that a cluster's machine has to accept a connection."""
_ANSWER_TIMEOUT = 10.0
"""Seconds that a cluster has to answer."""

START_TIMEOUT = "The current node timed out during startup"
"""How the error of a Ray begins whose processes were not up within 30 s."""
START_ATTEMPTS = 3
"""How often Ray is started on a machine that is too busy to start it within 30 s."""


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
        UserError: The cluster cannot be joined, or Ray cannot start on this machine.
    """
    ray_compat.configure_ray_environment(dashboard)
    if os.path.expanduser("~") == "~":  # HOME is not set, and the system knows no other
        os.environ["HOME"] = str(private_temp_folder())  # without one Ray Train cannot be imported
    address = cluster_address(address)
    imported = sys.modules.get("ray")
    connected = bool(imported and imported.is_initialized())
    if not connected:
        if address:
            check_address(address)
        start = f"Joining the Ray cluster {address}" if address else "Starting Ray on this machine"
        print_line(console, f"{start} …")
    import ray

    if warning := ray_compat.untested_ray_warning():
        print_line(console, warning)
    if connected:
        yield ray_compat.started_local_ray()
        return
    ray_compat.hide_secrets_in_command()
    level = logging.INFO if verbose else logging.ERROR
    options: dict[str, Any] = {"logging_level": level, "log_to_driver": verbose}
    with contextlib.ExitStack() as stack:
        if address:
            check_cluster_answers(address)
            try:
                ray.init(address=address, **options)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise _cannot_join(address, first_error_line(error.__cause__ or error)) from error
        else:
            _start_local_ray(stack, dashboard, options, console)
        if not verbose:
            for name in ("ray.train", "ray.data", "ray"):
                logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with termination_as_interrupt():
                yield not address
        finally:
            ray.shutdown()


def check_address(address: str) -> None:
    """Check that a cluster's address is HOST:PORT or `auto`, else a UserError."""
    submit = "ray job submit --working-dir . -- python -m cl_ray …"
    scheme, separator, _ = address.partition("://")
    if separator and scheme in ("http", "https"):
        submit = submit.replace("submit", f"submit --address {address}")
        reason = f"that is a dashboard; submit a job to it ({submit}), or give {_GCS_ADDRESS}"
        raise _cannot_join(address, reason)
    if separator:
        reason = f"{scheme}:// is not supported; submit a job ({submit}), or give {_GCS_ADDRESS}"
        raise _cannot_join(address, reason)
    host, _, port = address.rpartition(":")
    if address != "auto" and not (host and port.isdecimal() and 0 < int(port) < 65536):
        raise _cannot_join(address, f"give {_GCS_ADDRESS}, or auto for one on this machine")


def check_cluster_answers(address: str) -> None:
    """Check within seconds that a cluster can be joined; Ray itself tries for minutes.

    Raises:
        UserError: Nothing answers there, it is no Ray cluster, it wants another token, or this
            machine is none of its nodes.
    """
    gcs = address
    try:
        gcs = ray_compat.gcs_address(address)
        host, _, port = gcs.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_TIMEOUT).close()
    except OSError as error:  # also Ray's ConnectionError
        where = "there" if gcs == address else f"at {gcs}"
        reason = f"nothing answers {where} ({error.strerror or first_error_line(error)})"
        raise _cannot_join(
            address,
            f"{reason}; start the cluster, give another --address, or take --address local to "
            "start Ray on this machine",
        ) from error
    token = "export RAY_AUTH_MODE=token, and copy the token from the machine that started it"
    file, given = token_file(), os.environ.get("RAY_AUTH_TOKEN")
    with_token = os.environ.get("RAY_AUTH_MODE", "").lower() == "token"
    if with_token and not given and not (file and file.is_file() and file.stat().st_size):
        where = f"in {file}" if file else "as HOME is not set"
        raise _cannot_join(address, f"RAY_AUTH_MODE is token, and there is none {where}; {token}")
    status = ray_compat.ask_gcs(gcs, _ANSWER_TIMEOUT)
    if status == "UNAUTHENTICATED":
        reason = "it wants a token, and RAY_AUTH_MODE is not token"
        if with_token:
            source = "RAY_AUTH_TOKEN" if given else file
            reason = f"it wants another token than that in {source}"
        raise _cannot_join(address, f"{reason}; {token}")
    if status != "OK":
        reason = f"what answers there is no Ray cluster (gRPC status {status})"
        raise _cannot_join(address, f"{reason}; give {_GCS_ADDRESS}")
    if not ray_compat.ray_runs_here():
        raise _cannot_join(
            address,
            "this machine is none of its nodes; submit a job to its dashboard: ray job submit "
            "--address http://HOST:8265 --working-dir . -- python -m cl_ray …",
        )


def _cannot_join(address: str, reason: str) -> UserError:
    from_environment = address == os.environ.get("RAY_ADDRESS")
    source = f"{address} (of RAY_ADDRESS)" if from_environment else address
    return UserError(f"Cannot join the Ray cluster {source}: {reason}.")


def start_local_ray(
    stack: contextlib.ExitStack,
    temp_folder: Path,
    print_retry: Callable[[str], None],
    **options: Any,
) -> Any:
    """Start Ray on this machine; the stack ends what a killed driver would leave of it.

    Ray 2.60 gives its processes a fixed 30 s, which a busy machine may exceed. It then raises a
    bare Exception and leaves the processes: they are ended, and Ray is started again.

    Returns:
        What `ray.init` returns.

    Raises:
        RuntimeError: Ray was not up within 30 s in any of `START_ATTEMPTS`, or does not start.
    """
    import ray

    import psutil  # isort: skip  # Ray brings it along

    for attempt in range(1, START_ATTEMPTS + 1):
        watched = stack.enter_context(contextlib.ExitStack())
        watched.enter_context(session_watcher(temp_folder))
        before = psutil.Process().children()
        try:
            with ray_compat.fast_worker_start():
                return ray.init(address="local", _temp_dir=str(temp_folder), **options)
        except Exception as error:
            if not str(error).startswith(START_TIMEOUT):
                raise
            for process in set(psutil.Process().children()).difference(before):
                with contextlib.suppress(psutil.Error):  # it has ended
                    if any(str(temp_folder) in argument for argument in process.cmdline()):
                        process.kill()
                        process.wait()
            watched.close()  # for what these had started
            busy = "its processes were not up within 30 s, as this machine is too busy"
            if attempt == START_ATTEMPTS:
                raise RuntimeError(f"{busy} (tried {attempt} times); end other programs") from error
            print_retry(f"Ray did not start: {busy}. Trying again ({attempt + 1}) …")
    raise AssertionError("unreachable")


def _start_local_ray(
    stack: contextlib.ExitStack, dashboard: bool, options: dict[str, Any], console: Console
) -> None:
    """Start Ray on this machine, for this process alone.

    Raises:
        UserError: The machine lacks what Ray needs, or the token is not this user's.
    """
    # Ray's processes need seconds to start; torch, needed next, is imported meanwhile.
    threading.Thread(target=importlib.import_module, args=("torch",), daemon=True).start()
    if usable_cpus() < (os.cpu_count() or 1):  # Ray counts those of the machine or the container
        options = {"num_cpus": usable_cpus(), **options}
    for line in (*check_local_ray(), *prepare_token(private_temp_folder())):
        print_line(console, line)
    with ray_compat.local_ray_environment(dashboard), hangup_blocked():
        try:
            context = start_local_ray(
                stack,
                ray_temp_folder(),
                partial(print_line, console),
                include_dashboard=dashboard,
                **options,
            )
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(f"Ray does not start here: {first_error_line(error)}.") from error
    if dashboard:
        console.print(f"Ray dashboard: http://{context.dashboard_url}")
