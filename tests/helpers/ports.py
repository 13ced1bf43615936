"""All ports on which a fake machine listens, and whether what listens there asks for the token."""

import contextlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc  # type: ignore[import-untyped]

from helpers.machines import Machines, first_process, processes_beside

LISTEN = "0A"
"""The state in /proc/net/tcp."""
LOOPBACK = ("0100007F", "00000000000000000000000001000000")
METHODS = (
    "ray.rpc.NodeInfoGcsService/GetAllNodeInfo",
    "ray.rpc.InternalKVGcsService/GetInternalConfig",
    "ray.rpc.JobInfoGcsService/GetAllJobInfo",
    "ray.rpc.ActorInfoGcsService/GetAllActorInfo",
    "ray.rpc.NodeResourceInfoGcsService/GetAllTotalResources",
    "ray.rpc.autoscaler.AutoscalerStateService/GetClusterStatus",
    "ray.rpc.NodeManagerService/GetNodeStats",
    "ray.rpc.NodeManagerService/GetSystemConfig",
    "ray.rpc.ObjectManagerService/FreeObjects",
    "ray.rpc.CoreWorkerService/GetCoreWorkerStats",
    "ray.rpc.CoreWorkerService/NumPendingTasks",
    "ray.rpc.RayletDriver/ClusterInfo",
    "ray.rpc.ReporterService/GetTraceback",
    "ray.rpc.ReporterService/ReportOCMetrics",
    "ray.rpc.LogService/ListLogs",
    "ray.rpc.JobAgentService/InitializeJobEnv",
    "ray.rpc.events.EventAggregatorService/AddEvents",
    "grpc.health.v1.Health/Check",
)
"""Calls of Ray's services that change nothing."""
PATHS = (
    "/", "/api/version", "/api/jobs/", "/api/job_agent/jobs/", "/api/ray/version", "/nodes",
    "/api/cluster_status", "/api/serve/applications/", "/logs", "/metrics", "/api/healthz",
    "/api/local_raylet_healthz", "/worker/traceback", "/get_or_create_runtime_env",
)  # fmt: skip


@dataclass(frozen=True)
class Port:
    """A port that listens.

    Args:
        number: Its number.
        process: The process that listens, by `_short_name`.
        loopback: Whether only the machine itself reaches it.
    """

    number: int
    process: str
    loopback: bool


def listening_ports(machines: Machines, name: str) -> list[Port]:
    """The TCP ports on which a machine listens, by number."""
    process, _ = machines.running[name]
    first = first_process(process.pid)
    owners = dict(_socket_owners(first))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{first}/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[n] for n in (1, 3, 9))
            if state == LISTEN:
                address, _, number = local.rpartition(":")
                port = Port(int(number, 16), owners.get(inode, "?"), address in LOOPBACK)
                found[port.number, port.loopback] = port
    return sorted(found.values(), key=lambda port: (port.number, port.loopback))


def _socket_owners(first: int) -> Iterator[tuple[str, str]]:
    """Inode and process name of each socket in the process namespace of `first`."""
    for folder, words in processes_beside(first):
        with contextlib.suppress(OSError):  # it has ended
            for file in (folder / "fd").iterdir():
                target = os.readlink(file)
                if target.startswith("socket:["):
                    yield target[8:-1], _short_name(words)


def _short_name(words: list[str]) -> str:
    """The program of a command line, or the Python file that it runs.

    All of Ray's tasks and actors but its own agents and Train's workers are `ray::`.
    """
    files = [word for word in words if word.endswith(".py")]
    program = Path(words[0].split(" ")[0]).name
    name = Path(files[0]).name if files else program.split(".")[0].rstrip(":")
    own = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::RayTrainWorker")
    return "ray::" if name.startswith("ray::") and name not in own else name


@dataclass
class ProbeResult:
    """What a port answered.

    Args:
        answered: The calls that were answered; `metrics` stands for all of a port that shows
            Prometheus's text whatever it is asked.
        refused: How many calls were refused without a valid token.
    """

    answered: set[str] = field(default_factory=set)
    refused: int = 0


def probe(address: str, port: Port, token: str | None) -> ProbeResult:
    """Try all calls on a port, with a token or, by None, without."""
    headers = {"authorization": f"Bearer {token}"} if token else {}
    result = ProbeResult()
    if _probe_http(f"http://{address}:{port.number}", headers, result):
        return result
    with grpc.insecure_channel(f"{address}:{port.number}") as channel:
        for method in METHODS:
            try:
                channel.unary_unary(f"/{method}")(b"", timeout=15, metadata=tuple(headers.items()))
                result.answered.add(method)
            except grpc.RpcError as error:
                code = error.code()
                if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    break  # it does not speak gRPC
                if code == grpc.StatusCode.UNAUTHENTICATED:
                    result.refused += 1
                elif code != grpc.StatusCode.UNIMPLEMENTED:
                    result.answered.add(method)  # it got past the token to the empty request
    return result


def _probe_http(url: str, headers: dict[str, str], result: ProbeResult) -> bool:
    """Add the answers to `result`; returns whether the port speaks HTTP."""
    for path in PATHS:
        try:
            request = urllib.request.Request(url + path, headers=headers)
            with urllib.request.urlopen(request, timeout=15) as answer:
                metrics = answer.headers.get("Content-Type", "").startswith("text/plain; version=")
                result.answered.add("metrics" if metrics else path)
                if metrics:
                    return True
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                result.refused += 1
            else:  # 404 and 405 come from behind the check of the token
                result.answered.add(path)
        except Exception:  # it does not speak HTTP
            return False
    return True
