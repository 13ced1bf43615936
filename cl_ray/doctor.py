"""What may be wrong with a machine or a cluster, found before a run does; and the way out."""

import os
import re
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from cl_ray.errors import UserError, redact_credentials

State = Literal["ok", "warning", "failure"]
PACKAGES = ("ray", "torch", "torchvision", "pyarrow", "numpy")
"""Packages that have to be alike on every machine."""
CLOCK = 2.0
"""Seconds that two clocks may differ: beyond that S3 and TLS begin to refuse, logs to mislead."""
SECONDS = 120.0
"""How long machines may take to reach one another."""

COUNT_GPUS = "import torch; print(torch.cuda.device_count(), torch.version.cuda)"


@dataclass(frozen=True)
class Finding:
    """What one check found.

    Args:
        check: What was looked at.
        where: The machine.
        state: How it is.
        found: What was seen.
        advice: What to do about it; empty if nothing.
    """

    check: str
    where: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """What a machine says of itself.

    Args:
        name: Its host name.
        python: Python's version.
        packages: Version by package; "none" where it is not installed.
        devices: NVIDIA devices that the driver shows.
        usable: GPUs that torch sees, or why it sees none.
    """

    name: str
    python: str
    packages: dict[str, str]
    devices: int
    usable: int | str


def look() -> Machine:
    """Look at the machine on which this runs."""
    devices = len(list(Path("/dev").glob("nvidia[0-9]*")))
    return Machine(
        socket.gethostname(),
        ".".join(map(str, sys.version_info[:3])),
        {package: installed(package) for package in PACKAGES},
        devices,
        usable_gpus() if devices else 0,
    )


def installed(package: str) -> str:
    """The version that is installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def usable_gpus() -> int | str:
    """GPUs that torch sees, counted in a process of its own: Ray hides them from some."""
    environment = {k: v for k, v in os.environ.items() if k != "CUDA_VISIBLE_DEVICES"}
    done = subprocess.run(
        [sys.executable, "-c", COUNT_GPUS], env=environment, capture_output=True, text=True
    )
    words = done.stdout.split()
    if done.returncode or len(words) != 2:
        return (done.stderr.strip().splitlines() or ["no answer"])[-1]
    if words[1] == "None":
        return "torch is built for CPUs"
    return int(words[0])


def pins(file: Path) -> dict[str, str]:
    """The tested versions of a constraints file; none where there is no file."""
    text = file.read_text() if file.is_file() else ""
    return dict(re.findall(r"^([\w.-]+)==(\S+)", text, re.MULTILINE))


def check_versions(machine: Machine, pinned: dict[str, str]) -> Finding:
    """Whether a machine has the versions that were tested; `+cu129` and its like do not count."""
    wrong = {
        name: has
        for name, has in machine.packages.items()
        if has == "none" or has.partition("+")[0] != pinned.get(name, has.partition("+")[0])
    }
    if not wrong:
        tested = "as tested" if pinned else "no constraints.txt to compare with"
        has = machine.packages
        found = f"Python {machine.python}, ray {has['ray']}, torch {has['torch']}, {tested}"
        return Finding("versions", machine.name, "ok", found)
    found = ", ".join(
        f"{name} {has}, tested {pinned.get(name, '-')}" for name, has in wrong.items()
    )
    # Another Ray will not join; another torch may well do.
    hard = "none" in wrong.values() or "ray" in wrong
    return Finding(
        "versions", machine.name, "failure" if hard else "warning", found,
        "pip install -c constraints.txt " + " ".join(wrong),
    )  # fmt: skip


def check_gpus(machine: Machine, promised: float | None = None) -> Finding:
    """Whether torch sees the GPUs that the driver shows, and Ray counts as many.

    Args:
        machine: The machine.
        promised: GPUs that Ray has counted there; None without Ray.
    """
    seen = f"driver {machine.devices}, torch {machine.usable}"
    if promised is not None:
        seen += f", Ray {promised:g}"
    if machine.devices and not isinstance(machine.usable, int):
        advice = "install a torch for CUDA: pip install --force-reinstall -c constraints.txt torch"
        if "CPUs" not in machine.usable:
            advice = "mend what torch complains of"
        return Finding("GPUs", machine.name, "failure", seen, advice)
    usable = int(machine.usable)
    if usable < machine.devices:
        advice = "the driver is too old for this torch: take a newer image (nvidia-smi says which)"
        return Finding("GPUs", machine.name, "failure", seen, advice)
    if promised is not None and promised > usable:
        advice = "Ray promises GPUs that are not there: an image without driver, or wrong resources"
        return Finding("GPUs", machine.name, "failure", seen, advice)
    if promised is not None and promised < usable:
        return Finding(
            "GPUs",
            machine.name,
            "warning",
            seen,
            "GPUs that no run can use: `ray start --num-gpus`",
        )
    return Finding("GPUs", machine.name, "ok", seen)


def check_token(home: Path | None = None) -> Finding:
    """Whether this machine has a token that is its owner's alone, and uses it."""
    where, mode = socket.gethostname(), os.environ.get("RAY_AUTH_MODE", "")
    make = "(umask 077; ray get-auth-token --generate); export RAY_AUTH_MODE=token"
    file = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or (home or Path.home()) / ".ray/auth_token")
    if os.environ.get("RAY_AUTH_TOKEN"):
        found, there = "in RAY_AUTH_TOKEN", True
    else:
        found, there = f"{file}", file.is_file()
    if not there:
        return Finding("token", where, "failure", f"no {file}", make)
    if file.is_file() and stat.S_IMODE(file.stat().st_mode) & 0o077:
        return Finding("token", where, "failure", f"others may read {file}", f"chmod 600 {file}")
    if mode != "token":
        said = f"RAY_AUTH_MODE is {mode or 'not set'}"
        return Finding("token", where, "failure", said, "export RAY_AUTH_MODE=token")
    return Finding("token", where, "ok", found)


def check_door(dashboard: str) -> Finding:
    """Whether the cluster's dashboard turns away whoever comes without a token."""
    import urllib.error
    import urllib.request

    url = f"http://{dashboard}/api/version"
    try:
        urllib.request.urlopen(url, timeout=10)
    except urllib.error.HTTPError as error:
        if error.code == 401:
            return Finding("dashboard", dashboard, "ok", "asks for the token")
        return Finding(
            "dashboard", dashboard, "warning", f"answers {error.code}", "look at its log"
        )
    except OSError:
        return Finding("dashboard", dashboard, "ok", "not reached from here")
    advice = "set RAY_AUTH_MODE=token for `ray start` on every machine"
    return Finding("dashboard", dashboard, "failure", "answers without a token", advice)


def clock() -> float:
    """This machine's clock, in seconds since 1970."""
    return time.time()


def check_clock(name: str, clock: float, before: float, after: float) -> Finding:
    """Whether a machine's clock lies between the question and the answer, or near."""
    off = max(before - clock, clock - after, 0.0)
    if off > CLOCK:
        advice = "start time synchronisation there: chrony or systemd-timesyncd"
        return Finding("clock", name, "failure", f"{off:.1f} s off", advice)
    return Finding("clock", name, "ok", f"less than {CLOCK:g} s off")


def write_to(storage: str, name: str, file: str) -> str | None:
    """Write a file into the storage; why it cannot, or None."""
    from cl_ray.storage import RunStorage

    try:
        RunStorage(storage, name).write(file, b"here")
    except (OSError, ValueError, UserError) as error:
        return " ".join(str(error).split())[:200]
    return None


def check_storage(name: str, why: str | None, seen: bool, storage: str) -> Finding:
    """Whether a machine could write there, and what it wrote was seen from here."""
    if why:
        advice = "give the machine the right to write there (its role or account), or mount it"
        return Finding("storage", name, "failure", why, advice)
    if not seen:
        advice = "not shared: give s3://..., gs://... or a path that every machine mounts"
        return Finding("storage", name, "failure", f"its {storage} is another", advice)
    return Finding("storage", name, "ok", f"writes {storage}")


def meet(rank: int, world: int, address: str, gpu: bool) -> float:
    """Add 1 over all machines, as a run's workers do; what it came to."""
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    dist.init_process_group(
        "nccl" if gpu else "gloo", f"tcp://{address}", rank=rank, world_size=world,
        timeout=timedelta(seconds=SECONDS / 2),
    )  # fmt: skip
    try:
        one = torch.ones(1, device="cuda" if gpu else "cpu")
        dist.all_reduce(one)
        return float(one)
    finally:
        dist.destroy_process_group()


def examine_here(storage: str | None, constraints: Path) -> Iterator[Finding]:
    """The checks that need no cluster.

    Args:
        storage: Where runs are to be written; None leaves that check out.
        constraints: File of the tested versions.
    """
    machine = look()
    yield check_versions(machine, pins(constraints))
    yield check_gpus(machine)
    yield check_token()
    if storage:
        from cl_ray.storage import RunStorage

        folder = RunStorage.at(storage, f".doctor-{uuid4().hex}")
        why = write_to(folder.storage, folder.name, "here")
        if not why:
            filesystem, path = folder.open()
            filesystem.delete_dir(path)
        yield check_storage(machine.name, why, why is None, redact_credentials(storage))


def examine_cluster(storage: str | None, constraints: Path) -> Iterator[Finding]:
    """The checks of every machine of the cluster that this process has joined.

    Args:
        storage: Where runs are to be written; None leaves that check out.
        constraints: File of the tested versions.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    yield check_token()
    pinned = pins(constraints)
    nodes = [node for node in ray.nodes() if node["Alive"]]

    def at(node: dict[str, Any], task: Any, *arguments: Any, gpus: int = 0) -> Any:
        """The task's reference, on that machine and no other."""
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        remote = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=0)(task)
        return remote.options(scheduling_strategy=there).remote(*arguments)

    def answer(reference: Any) -> Any:
        """What it came to, or the error."""
        try:
            return ray.get(reference, timeout=SECONDS)
        except Exception as error:
            return error

    for node in nodes:
        name = node["NodeManagerHostname"]
        machine = answer(at(node, look))
        if isinstance(machine, Exception):
            advice = (
                "submit the doctor as a job: ray job submit --working-dir . -- python -m cl_ray"
            )
            yield Finding("Python", name, "failure", first_words(machine), f"{advice} doctor")
            continue
        yield check_versions(machine, pinned)
        yield check_gpus(machine, node["Resources"].get("GPU", 0.0))
        before = clock()
        shown = answer(at(node, clock))
        if isinstance(shown, Exception):
            continue  # it has gone meanwhile
        yield check_clock(name, shown, before, clock())
    if storage:
        yield from _storage(storage, nodes, at, answer)
    workers = [node for node in nodes if node["Resources"].get("CPU")]
    if len(workers) > 1:
        yield _meeting(workers, at, answer)
    else:
        found = f"{len(workers)} machine with CPUs: nothing to try"
        yield Finding("workers meet", "cluster", "ok", found)
    dashboard = getattr(ray._private.worker._global_node, "webui_url", None)
    if dashboard:
        yield check_door(dashboard)


def _storage(storage: str, nodes: list[Any], at: Any, answer: Any) -> Iterator[Finding]:
    from cl_ray.storage import RunStorage

    folder = RunStorage.at(storage, f".doctor-{uuid4().hex}")
    storage = folder.storage
    why = write_to(storage, folder.name, "here")
    if why:
        yield check_storage(socket.gethostname(), why, False, storage)
        return
    try:
        for node in nodes:
            name = node["NodeManagerHostname"]
            why = answer(at(node, write_to, storage, folder.name, node["NodeID"]))
            if isinstance(why, Exception):
                why = first_words(why)
            seen = why is None and folder.read(node["NodeID"]) is not None
            yield check_storage(name, why, seen, redact_credentials(storage))
    finally:
        filesystem, path = folder.open()
        filesystem.delete_dir(path)


def _meeting(workers: list[Any], at: Any, answer: Any) -> Finding:
    """All workers' machines add up a number: over nccl if all of them have GPUs, else gloo."""
    gpu = all(node["Resources"].get("GPU") for node in workers)
    backend = "nccl" if gpu else "gloo"
    port = answer(at(workers[0], free_port))
    address = f"{workers[0]['NodeManagerAddress']}:{port}"
    started = [
        at(node, meet, rank, len(workers), address, gpu, gpus=int(gpu))
        for rank, node in enumerate(workers)
    ]
    for reference in started:
        total = answer(reference)
        if isinstance(total, Exception) or total != len(workers):
            advice = (
                "let the machines reach one another on all ports, and start Ray with "
                f"{backend.upper()}_SOCKET_IFNAME set to the interface between them"
            )
            said = first_words(total) if isinstance(total, Exception) else f"{total}"
            return Finding("workers meet", "cluster", "failure", f"{backend}: {said}", advice)
    return Finding("workers meet", "cluster", "ok", f"{len(workers)} machines over {backend}")


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def first_words(error: Exception) -> str:
    """The last line of an error, where the reason stands."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines or [type(error).__name__])[-1][:200]
