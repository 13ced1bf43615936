"""Checks of a machine or a cluster that find problems before a run does."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from cl_ray.environment import package_version
from cl_ray.errors import UserError
from cl_ray.storage import RunStorage
from cl_ray.training.auth_token import readable_by_others, token_file
from cl_ray.training.machine import Finding, State, check_machine_for_ray
from cl_ray.training.resources import alive_nodes, start_on_node

PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "numpy")
"""Packages that must have the same versions on all nodes."""

_MISSING = "missing"
_MAX_CLOCK_OFFSET = 2.0
"""Seconds between two clocks from which S3 and TLS may refuse requests."""
_TIMEOUT = 120.0
"""Seconds that nodes have to answer and to reach one another."""
_NEW_TOKEN = (
    "(umask 077; ray get-auth-token --generate); chmod go= ~/.ray ~/.ray/auth_token; "
    "export RAY_AUTH_MODE=token"
)
_COUNT_GPUS = "import torch; print(torch.cuda.device_count(), torch.version.cuda)"


@dataclass(frozen=True)
class MachineInfo:
    """Software and GPUs of a machine.

    Args:
        packages: Version of each package; "missing" if it is not installed.
        devices: NVIDIA devices of the driver.
        usable: GPUs that torch can use, or the reason why it cannot use any.
    """

    name: str
    python: str
    packages: dict[str, str]
    devices: int
    usable: int | str


def inspect_machine() -> MachineInfo:
    """Return software and GPUs of the machine on which this runs."""
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return MachineInfo(
        socket.gethostname(),
        ".".join(map(str, sys.version_info[:3])),
        {package: package_version(package, _MISSING) for package in PACKAGES},
        devices,
        _usable_gpus() if devices else 0,
    )


def _usable_gpus() -> int | str:
    """Count torch's GPUs in a process of its own, as Ray hides GPUs from some of its workers."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", _COUNT_GPUS], env=environment, capture_output=True, text=True
    )
    words = done.stdout.split()
    if done.returncode or len(words) != 2:
        return (done.stderr.strip().splitlines() or ["no answer"])[-1]
    return "torch is built for CPUs" if words[1] == "None" else int(words[0])


def read_constraints(file: Path) -> dict[str, str]:
    """Return the version of each package in a constraints file; empty if there is no file."""
    text = file.read_text() if file.is_file() else ""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def check_versions(machine: MachineInfo, tested: dict[str, str]) -> Finding:
    """Check that a machine has the tested versions, suffixes such as `+cu129` aside."""
    versions = machine.packages
    plain = {package: version.partition("+")[0] for package, version in versions.items()}
    wrong = [p for p, v in plain.items() if v == _MISSING or v != tested.get(p, v)]
    if not wrong:
        note = "as tested" if tested else "no constraints.txt to compare with"
        found = f"Python {machine.python}, ray {versions['ray']}, torch {versions['torch']}, {note}"
        return Finding("versions", machine.name, "ok", found)
    found = ", ".join(f"{p} {versions[p]}, tested {tested.get(p, '-')}" for p in wrong)
    # Nodes with different versions of Ray cannot form a cluster; another torch may work.
    fatal = "ray" in wrong or any(plain[package] == _MISSING for package in wrong)
    advice = f"pip install {'-c constraints.txt ' if tested else ''}{' '.join(wrong)}"
    if (Path.home() / "cl_ray" / "venv").is_dir():  # a machine that `ray up` has set up
        advice = "end the jobs, then `ray up` again, which installs cluster/requirements.txt"
    return Finding("versions", machine.name, "failure" if fatal else "warning", found, advice)


def check_gpus(machine: MachineInfo, ray_gpus: float | None = None) -> Finding:
    """Check that torch can use the driver's GPUs, and that Ray, if it runs, counts as many."""
    found = f"driver {machine.devices}, torch {machine.usable}"
    if ray_gpus is not None:
        found += f", Ray {ray_gpus:g}"
    state: State = "failure"
    if not isinstance(machine.usable, int):
        for_cpus = "CPUs" in machine.usable
        advice = "install a torch for CUDA" if for_cpus else "fix the error that torch reports"
    elif machine.usable < machine.devices:
        advice = "the driver is too old for this torch: use a newer image (see nvidia-smi)"
    elif ray_gpus is not None and ray_gpus > machine.usable:
        advice = "Ray counts GPUs that do not exist: an image without driver, or wrong resources"
    elif ray_gpus is not None and ray_gpus < machine.usable:
        state, advice = "warning", "no run can use some GPUs: set `ray start --num-gpus`"
    else:
        state, advice = "ok", ""
    return Finding("GPUs", machine.name, state, found, advice)


def check_token(cluster: bool = True) -> Finding:
    """Check that this machine has a token of Ray that only its owner can read, and uses it.

    Without a cluster it may have none, as Ray makes one when it starts here.
    """
    mode, file = os.environ.get("RAY_AUTH_MODE", ""), token_file()
    in_environment = bool(os.environ.get("RAY_AUTH_TOKEN"))
    state: State = "failure"
    if (mode or "token").lower() != "token" or (cluster and not mode):
        found, advice = f"RAY_AUTH_MODE is {mode or 'not set'}", "export RAY_AUTH_MODE=token"
    elif in_environment:
        state, found, advice = "ok", "in RAY_AUTH_TOKEN", ""
    elif not file or not file.is_file():
        found, advice = f"no {file}" if file else "none, as HOME is not set", _NEW_TOKEN
        if not cluster:
            state, found, advice = "ok", f"{found}; a run here makes one", ""
    elif readable_by_others(file):
        found, advice = f"others can read {file}", f"chmod 700 {file.parent}; chmod 600 {file}"
    else:
        state, found, advice = "ok", str(file), ""
    return Finding("token", socket.gethostname(), state, found, advice)


def check_dashboard(address: str) -> Finding:
    """Check that the dashboard at an address refuses requests without a token."""
    import urllib.error
    import urllib.request

    try:
        # Not by a proxy, which does not know the cluster's addresses.
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        direct.open(f"http://{address}/api/version", timeout=10)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return Finding("dashboard", address, "ok", "asks for the token")
        return Finding("dashboard", address, "warning", f"answers {error.code}", "see its log")
    except OSError:
        return Finding("dashboard", address, "ok", "not reachable from here")
    advice = "set RAY_AUTH_MODE=token for `ray start` on every node"
    return Finding("dashboard", address, "failure", "answers without a token", advice)


def check_clock(node: str, clock: float, before: float, after: float) -> Finding:
    """Check a node's clock, read between two times of this machine's (seconds since 1970)."""
    offset = max(before - clock, clock - after, 0.0)
    if offset > _MAX_CLOCK_OFFSET:
        advice = "start time synchronisation there: chrony or systemd-timesyncd"
        return Finding("clock", node, "failure", f"{offset:.1f} s off", advice)
    return Finding("clock", node, "ok", f"less than {_MAX_CLOCK_OFFSET:g} s off")


def check_storage(node: str, error: str | None, seen: bool, storage: str) -> Finding:
    """Check that a node wrote a file to the storage (else `error`) that was `seen` from here."""
    if error:
        advice = "give the node write access (its role or account), or mount the folder"
        return Finding("storage", node, "failure", error, advice)
    if not seen:
        advice = "not shared: use s3://..., gs://... or a path that every node mounts"
        return Finding("storage", node, "failure", f"it has another {storage}", advice)
    return Finding("storage", node, "ok", f"writes {storage}")


def check_machine(storage: str | None, constraints: Path) -> Iterator[Finding]:
    """Run the checks that need no cluster; without a storage, all but that one."""
    machine = inspect_machine()
    yield check_versions(machine, read_constraints(constraints))
    yield check_gpus(machine)
    yield check_token(cluster=False)
    yield from check_machine_for_ray()
    if storage:
        yield from _check_writes(storage, [])


def check_cluster(storage: str | None, constraints: Path) -> Iterator[Finding]:
    """Run the checks of all nodes of the joined cluster; without a storage, all but that one."""
    import ray

    yield check_token()
    tested = read_constraints(constraints)
    nodes = alive_nodes()
    for node in nodes:
        name = node["NodeManagerHostname"]
        machine = _result(_submit(node, inspect_machine))
        if isinstance(machine, Exception):
            advice = "run it as a job: ray job submit --working-dir . -- python -m cl_ray doctor"
            yield Finding("Python", name, "failure", _last_line(machine), advice)
            continue
        yield check_versions(machine, tested)
        yield check_gpus(machine, node["Resources"].get("GPU", 0.0))
        findings = _result(_submit(node, check_machine_for_ray))
        if not isinstance(findings, Exception):  # else the node has just died
            yield from findings
        before = time.time()
        clock = _result(_submit(node, read_clock))
        if not isinstance(clock, Exception):  # else the node has just died
            yield check_clock(name, clock, before, time.time())
    if storage:
        yield from _check_writes(storage, nodes)
    workers = [node for node in nodes if node["Resources"].get("CPU")]
    if len(workers) > 1:
        yield _check_all_reduce(workers)
    else:
        found = f"{len(workers)} node with CPUs: nothing to check"
        yield Finding("all-reduce", "cluster", "ok", found)
    dashboard = ray.init(ignore_reinit_error=True).dashboard_url
    if dashboard:
        yield check_dashboard(dashboard)


def _check_writes(storage: str, nodes: list[Any]) -> Iterator[Finding]:
    """Write a file here and on every node, and look for the nodes' files from here."""
    folder = RunStorage.at(storage, f".doctor-{uuid4().hex}")
    shown = folder.storage
    error = try_write(folder, "this-machine")
    if error or not nodes:
        yield check_storage(socket.gethostname(), error, True, shown)
    if error:
        return
    try:
        for node in nodes:
            error = _result(_submit(node, try_write, folder, node["NodeID"]))
            if isinstance(error, Exception):
                error = _last_line(error)
            seen = error is None and folder.read(node["NodeID"]) is not None
            yield check_storage(node["NodeManagerHostname"], error, seen, shown)
    finally:
        filesystem, path = folder.open()
        filesystem.delete_dir(path)


def _check_all_reduce(workers: list[Any]) -> Finding:
    """Let all nodes add a number up: over NCCL if all of them have GPUs, else over Gloo."""
    gpu = all(node["Resources"].get("GPU") for node in workers)
    backend = "nccl" if gpu else "gloo"
    address = f"{workers[0]['NodeManagerAddress']}:{_result(_submit(workers[0], free_port))}"
    started = [
        _submit(node, all_reduce_ones, rank, len(workers), address, gpu, gpus=int(gpu))
        for rank, node in enumerate(workers)
    ]
    for total in map(_result, started):
        if total != len(workers):
            advice = (
                "open all ports between the nodes, and start Ray with "
                f"{backend.upper()}_SOCKET_IFNAME set to the interface between them"
            )
            reason = _last_line(total) if isinstance(total, Exception) else f"the sum is {total}"
            return Finding("all-reduce", "cluster", "failure", f"{backend}: {reason}", advice)
    return Finding("all-reduce", "cluster", "ok", f"{len(workers)} nodes over {backend}")


def _submit(node: dict[str, Any], function: Callable[..., Any], *args: Any, gpus: int = 0) -> Any:
    """Start a function on that node and no other; return its reference."""
    return start_on_node(node["NodeID"], function, *args, num_gpus=gpus, max_retries=0)


def _result(reference: Any) -> Any:
    """Return a reference's result, or the error that it ended with."""
    import ray

    try:
        return ray.get(reference, timeout=_TIMEOUT)
    except Exception as error:
        return error


def try_write(folder: RunStorage, file: str) -> str | None:
    """Write a file into a folder; return why it cannot be written, None if it can."""
    try:
        folder.write(file, b"doctor")
    except (OSError, ValueError, UserError) as error:
        return " ".join(str(error).split())[:200]
    return None


def read_clock() -> float:
    """Return this machine's time in seconds since 1970."""
    return time.time()


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def all_reduce_ones(rank: int, world: int, address: str, gpu: bool) -> float:
    """Return the sum of a 1 from each of `world` processes, as the workers of a run reduce."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if gpu else "gloo",
        f"tcp://{address}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=_TIMEOUT / 2),
    )
    try:
        one = torch.ones(1, device="cuda" if gpu else "cpu")
        dist.all_reduce(one)
        return float(one)
    finally:
        dist.destroy_process_group()


def _last_line(error: Exception) -> str:
    """Return the last line of an error, which gives the reason."""
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].strip()[:200]
