"""Every port that a machine listens on, and whether what listens there asks for the token."""

import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from helpers.machines import Machines, child_of

LISTEN = "0A"
"""How /proc/net/tcp writes the state."""
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
class Door:
    """A port that listens.

    Args:
        number: The port.
        process: Who listens.
        loopback: Whether it is reached from the machine itself alone.
    """

    number: int
    process: str
    loopback: bool


def doors(machines: Machines, name: str) -> list[Door]:
    """The TCP ports that a machine listens on, by number."""
    process, _ = machines.running[name]
    first = child_of(process.pid)
    owners = dict(_owners(first))
    found = {}
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/{first}/net/{table}").read_text().splitlines()[1:]:
            local, state, inode = (line.split()[n] for n in (1, 3, 9))
            if state != LISTEN:
                continue
            address, _, number = local.rpartition(":")
            loopback = address in ("0100007F", "00000000000000000000000001000000")
            door = Door(int(number, 16), owners.get(inode, "?"), loopback)
            found[door.number, door.loopback] = door
    return sorted(found.values(), key=lambda door: (door.number, door.loopback))


def _owners(first: int) -> Iterator[tuple[str, str]]:
    """Inode of a socket, and the name of the process that holds it, on the machine of that pid."""
    space = os.readlink(f"/proc/{first}/ns/pid")
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if os.readlink(folder / "ns" / "pid") != space:
                continue
            name = _name((folder / "cmdline").read_bytes().decode().split("\0"))
            for file in (folder / "fd").iterdir():
                target = os.readlink(file)
                if target.startswith("socket:["):
                    yield target[8:-1], name
        except OSError:
            continue


def _name(words: list[str]) -> str:
    """What people call a process: its program, or the Python file that it runs."""
    files = [word for word in words if word.endswith(".py")]
    program = Path(words[0].split(" ")[0]).name
    return Path(files[0]).name if files else program.split(".")[0].rstrip(":")


def process_of(door: Door) -> str:
    """Who listens, all tasks and actors but Ray's own agents and Train's workers under one name."""
    own = ("ray::DashboardAgent", "ray::RuntimeEnvAgent", "ray::RayTrainWorker")
    if door.process.startswith("ray::") and door.process not in own:
        return "ray::"
    return door.process


@dataclass
class Answer:
    """What came of knocking at a door.

    Args:
        answered: The calls that were answered, as they are named here; `metrics` for all of a
            port that shows Prometheus's text whatever it is asked.
        refused: How many were refused for want of a valid token.
    """

    answered: set[str] = field(default_factory=set)
    refused: int = 0


def knock(address: str, door: Door, token: str | None) -> Answer:
    """Try all calls there.

    Args:
        address: The machine's.
        door: The port.
        token: What is shown; None shows nothing.
    """
    head = {"authorization": f"Bearer {token}"} if token else {}
    found = Answer()
    if _http(f"http://{address}:{door.number}", head, found):
        return found
    with grpc.insecure_channel(f"{address}:{door.number}") as channel:
        for method in METHODS:
            try:
                channel.unary_unary(f"/{method}")(b"", timeout=3, metadata=tuple(head.items()))
                found.answered.add(method)
            except grpc.RpcError as error:
                code = error.code()  # type: ignore[attr-defined]
                if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    break  # it does not speak gRPC
                if code == grpc.StatusCode.UNAUTHENTICATED:
                    found.refused += 1
                elif code != grpc.StatusCode.UNIMPLEMENTED:
                    found.answered.add(method)  # it came as far as looking at the empty question
    return found


def _http(url: str, head: dict[str, str], found: Answer) -> bool:
    """Whether it speaks HTTP; what it answered goes into `found`."""
    for path in PATHS:
        try:
            with urllib.request.urlopen(
                urllib.request.Request(url + path, headers=head), timeout=5
            ) as answer:
                shows = answer.headers.get("Content-Type", "").startswith("text/plain; version=")
                found.answered.add("metrics" if shows else path)
                if shows:
                    return True
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                found.refused += 1
            else:  # 404 and 405 come from behind the gate
                found.answered.add(path)
        except Exception:  # it does not speak HTTP
            return False
    return True
