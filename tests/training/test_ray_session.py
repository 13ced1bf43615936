"""A Ray that is started here: what its processes get, and what others get. Clusters to join."""

import json
import os
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import ray
from helpers.commands import cl_ray, run_flags
from helpers.local_ray import cluster_head
from helpers.processes import children, wait_for
from rich.console import Console

from cl_ray.errors import UserError
from cl_ray.training.machine import private_temp_folder
from cl_ray.training.ray_session import ray_session

ROOT = Path(__file__).parents[1]
NOBODY = 65534
HEALTH = {"grpc.health.v1.Health/Check", "/api/healthz", "/api/local_raylet_healthz"}
"""What Ray answers to everybody: that a process is alive."""

SCRIPT = """
import os
import ray
from rich.console import Console
from cl_ray.training.ray_session import ray_session

def seen():
    return os.environ.get("CUDA_VISIBLE_DEVICES"), os.nice(0)

os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])
with ray_session(None, False, False, Console(quiet=True)):
    print(ray.cluster_resources()["CPU"])
    given = [ray.remote(num_cpus=1, num_gpus=gpus)(seen).remote() for gpus in (0, 1, 0.5)]
    print([gpus for gpus, nice in ray.get(given)])
    print({nice for gpus, nice in ray.get(given)} == {os.nice(0)})
"""


@pytest.mark.ray
def test_a_process_sees_the_gpus_that_it_was_given_and_is_as_nice_as_its_starter() -> None:
    """One GPU by Ray's count, which a driver's runtime would show to everybody; one granted CPU."""
    environment = {name: v for name, v in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=500,
        env={**environment, "CUDA_VISIBLE_DEVICES": "3", "RAY_OVERRIDE_RESOURCES": '{"GPU": 1}'},
    )  # fmt: skip
    assert done.stdout == "1.0\n['', '3', '3']\nTrue\n", done.stderr


@pytest.mark.parametrize(("version", "tested"), [("2.60.3", True), ("2.70.0", False)])
def test_an_untested_version_of_ray_prints_one_line(
    version: str, tested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ray.__version__", version)
    console = Console(width=300)
    with (
        console.capture() as printed,
        pytest.raises(UserError, match="Cannot join"),
        ray_session("127.0.0.1:1", False, False, console),
    ):
        pass
    joining = "Joining the Ray cluster 127.0.0.1:1 …\n"
    warning = f"Ray {version} is not tested with cl_ray: the tested version is 2.60.\n"
    assert printed.get() == joining + ("" if tested else warning)


# Clusters that cannot be joined


def refusal(address: str) -> str:
    began = time.monotonic()
    with (
        pytest.raises(UserError, match="Cannot join the Ray cluster ") as refused,
        ray_session(address, False, False, Console(quiet=True)),
    ):
        pass
    assert time.monotonic() - began < 60  # Ray itself tries for minutes
    return str(refused.value)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("http://10.0.0.1:8265", "ray job submit --address http://10.0.0.1:8265 --working-dir ."),
        ("ray://10.0.0.1:10001", "ray:// is not supported; submit a job (ray job submit"),
        ("10.0.0.1", "give HOST:PORT of its head's GCS (HOST:6379), or auto"),
        ("10.0.0.1:redis", "give HOST:PORT of its head's GCS"),
    ],
)
def test_an_address_that_is_none(address: str, reason: str) -> None:
    assert reason in refusal(address)


def test_a_dead_cluster_is_named_with_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("", 0))  # bound, and nobody listens
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        message = refusal("")
    assert message.startswith(f"Cannot join the Ray cluster {address} (of RAY_ADDRESS): nothing")
    assert message.endswith("or take --address local to start Ray on this machine.")


def test_what_answers_is_no_ray() -> None:
    server = HTTPServer(("", 0), BaseHTTPRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        message = refusal(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert "what answers there is no Ray cluster (gRPC status UNAVAILABLE)" in message


@pytest.mark.ray
def test_a_cluster_that_wants_a_token(tmp_path: Path) -> None:
    """Without one, with another one, and with the right one. The first line comes at once."""
    right = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "1" * 64}
    with cluster_head(**right) as address:
        without = {"HOME": str(tmp_path), "RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": ""}
        tries: list[tuple[dict[str, str], str]] = [
            ({**without, "RAY_AUTH_MODE": ""}, "it wants a token, and RAY_AUTH_MODE is not token"),
            ({**without, "RAY_AUTH_MODE": "token"}, f"there is none in {tmp_path}/.ray/auth_token"),
            (
                {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64},
                "it wants another token than that in RAY_AUTH_TOKEN",
            ),
        ]
        for variables, reason in tries:
            done = cl_ray("doctor", f"--address={address}", cwd=None, **variables)
            assert done.stdout == f"Joining the Ray cluster {address} …\n"
            assert done.stderr.startswith(f"cl-ray: Cannot join the Ray cluster {address}: ")
            assert reason in done.stderr
            assert done.stderr.endswith("copy the token from the machine that started it.\n")
        done = cl_ray("doctor", f"--address={address}", cwd=None, **right)
        assert "in RAY_AUTH_TOKEN" in done.stdout


# Other users of the machine


ATTACK = """
import json, os, socket, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from helpers.ports import Port, probe

wanted = json.load(sys.stdin)
if os.geteuid() == 0:
    os.setgroups([]), os.setgid(NOBODY), os.setuid(NOBODY)
answered, reached = [], []
tries = [(Port(*port, True), token) for port in wanted["ports"] for token in (None, "0" * 64)]
with ThreadPoolExecutor(8) as pool:  # one that does not speak gRPC is given up after 20 s
    for result in pool.map(lambda given: probe("127.0.0.1", *given), tries):
        answered.extend(result.answered)
for path in wanted["paths"]:
    try:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.connect(path) if Path(path).is_socket() else Path(path).open().close()
        reached.append(path)
    except OSError:
        pass
print(json.dumps([answered, reached]))
"""
"""Tries what listens, and what lies on the disk, as another user if this one may become one."""


def listening(pids: list[int]) -> Iterator[tuple[int, str, str]]:
    """Yield the port and the address that each process listens on, and its name."""
    import psutil  # which Ray brings along

    for process in map(psutil.Process, pids):
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN:
                name = Path((process.cmdline() or ["?"])[0].split(" ")[0]).name
                yield connection.laddr.port, connection.laddr.ip, name.partition(":")[0] or name


@pytest.mark.slow
@pytest.mark.ray
def test_other_users_get_no_answer_from_a_run(make_digits: Any, tmp_path: Path) -> None:
    """Of two workers, without a dashboard: all listen on loopback, and nothing answers."""
    assert not ray.is_initialized()
    home = tmp_path / "home"
    home.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_AUTH")}
    flags = [*run_flags(tmp_path / "runs/demo", make_digits(200)), "--epochs=100000"]
    more = ["--workers=2", "--cpus-per-worker=1", "--evaluation.every=0"]
    before = os.umask(0)
    run = subprocess.Popen(
        [sys.executable, "-m", "cl_ray", "train", *flags, *more],
        env={**environment, "HOME": str(home)}, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    os.umask(before)
    try:
        metrics = tmp_path / "runs/demo/metrics.jsonl"
        wait_for(lambda: run.poll() is not None or metrics.is_file(), "an epoch")
        assert run.poll() is None
        found = list(listening([run.pid, *(pid for pid, _ in children(run.pid))]))
        assert {"gcs_server", "raylet", "python", "ray"} <= {name for _, _, name in found}
        assert {ip.removeprefix("::ffff:") for _, ip, _ in found} == {"127.0.0.1"}
        token, private = home / ".ray/auth_token", private_temp_folder()
        session = max(private.glob(f"ray/session_*_{run.pid}"))  # an older one had the same pid
        patterns = ("sockets/raylet", "sockets/plasma_store", "process_group-*/store")
        paths = [token, *(path for pattern in patterns for path in session.glob(pattern))]
        assert len(paths) == 4
        wanted = {"ports": [(port, name) for port, _, name in found], "paths": [*map(str, paths)]}
        assert [stat.S_IMODE(p.stat().st_mode) for p in (token, token.parent, private)] == [
            0o600, 0o700, 0o700,
        ]  # fmt: skip
        tried = subprocess.run(
            [sys.executable, "-c", f"NOBODY = {NOBODY}\n{ATTACK}"], text=True, check=True,
            input=json.dumps(wanted), stdout=subprocess.PIPE,
            env={**environment, "PYTHONPATH": str(ROOT), "HOME": "/nowhere"},
        )  # fmt: skip
        answered, reached = json.loads(tried.stdout)
        assert "grpc.health.v1.Health/Check" in answered  # else nothing was tried
        assert set(answered) <= HEALTH
        if os.geteuid() == 0:
            assert reached == []
    finally:
        run.terminate()
        run.wait()
