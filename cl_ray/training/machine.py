"""What Ray needs of the machine it starts on: a temporary folder, shared memory and memory."""

import errno
import math
import os
import shutil
import socket
import stat
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from cl_ray.errors import UserError
from cl_ray.training.ray_compat import available_memory

State = Literal["ok", "warning", "failure"]

MIN_FREE_DISK = 200_000_000
"""Bytes that the temporary folder must have free: logs, and what the object store spills."""
MAX_DISK_USAGE = 0.95
"""The share of a disk beyond which Ray writes no more objects to it
(`RAY_local_fs_capacity_threshold`)."""
OBJECT_STORE_SHARE, OBJECT_STORE_CAP = 0.3, 10_000_000_000
"""The share of the free memory, and the most bytes, that must be free in /dev/shm for Ray to put
its object store there, else in the temporary folder."""
MIN_MEMORY = 2_500_000_000
"""Bytes that must be free: Ray, the driver and one small worker take 2.9 GB, some of it files."""
MAX_SOCKET_PATH = 103 if sys.platform == "darwin" else 107
"""Bytes that the path of a Unix socket may have."""
_LONGEST_SOCKET = "session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
"""The longest path below Ray's temporary folder at which it opens a socket."""
_PROBE = bytes(1_000_000)


@dataclass(frozen=True)
class Finding:
    """The result of one check of a node; `advice` is empty if there is nothing to fix."""

    check: str
    node: str
    state: State
    found: str
    advice: str = ""

    def __str__(self) -> str:
        return f"{self.found}: {self.advice}." if self.advice else f"{self.found}."


def private_temp_folder() -> Path:
    """This user's folder for Ray: in RAY_TMPDIR, in TMPDIR on Linux, else in /tmp."""
    given = os.environ.get("RAY_TMPDIR")
    if not given and sys.platform == "linux":
        given = os.environ.get("TMPDIR")
    return Path(given or "/tmp").absolute() / f"ray-{os.geteuid()}"


def ray_temp_folder() -> Path:
    """Ray's temporary folder, in the private one: Ray opens its own folders to everybody."""
    return private_temp_folder() / "ray"


def check_machine_for_ray() -> list[Finding]:
    """Run the checks of this machine; the first failure keeps Ray from starting here."""
    return [check_temp_folder(), check_shared_memory(), check_memory()]


def check_temp_folder() -> Finding:
    """Create the private folder in Ray's temporary folder and check it.

    It must be this user's alone, its path short enough for sockets, and have room.
    """
    folder, finding = private_temp_folder(), partial(Finding, "temp folder", socket.gethostname())
    variable = "RAY_TMPDIR" if os.environ.get("RAY_TMPDIR") else "TMPDIR"
    elsewhere = "set RAY_TMPDIR to a folder of yours with room, such as /var/tmp"
    length = len(os.fsencode(ray_temp_folder() / _LONGEST_SOCKET))
    if length > MAX_SOCKET_PATH:
        most = MAX_SOCKET_PATH - length + len(os.fsencode(folder.parent))
        found = f"{variable} {folder.parent} is too long for the path of a socket"
        shorter = f"set RAY_TMPDIR to one of at most {most} bytes, such as /tmp"
        return finding("failure", found, shorter)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        info = folder.lstat()
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid():
            return finding("failure", f"{folder} belongs to another user", elsewhere)
        folder.chmod(0o700)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(_PROBE)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        found = f"{folder} {'is full' if full else 'cannot be written'} ({error.strerror})"
        return finding("failure", found, elsewhere)
    disk = shutil.disk_usage(folder)
    found = f"{folder} has {_size(disk.free)} of {_size(disk.total)} free"
    if disk.free < MIN_FREE_DISK:
        return finding("failure", f"{found}, too little for Ray", elsewhere)
    if disk.free < (1 - MAX_DISK_USAGE) * disk.total:
        found += ", and Ray writes no objects to a disk that is 95 % full"
        return finding("warning", found, elsewhere)
    return finding("ok", found)


def check_shared_memory() -> Finding:
    """Check the size of /dev/shm, in which Ray keeps objects on Linux."""
    finding = partial(Finding, "shared memory", socket.gethostname())
    if sys.platform != "linux":
        return finding("ok", "not used on this system")
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError as error:
        found = f"/dev/shm cannot be used ({error.strerror})"
        return finding("failure", found, "mount a tmpfs there")
    wanted = min(OBJECT_STORE_SHARE * available_memory(), OBJECT_STORE_CAP)
    found = f"/dev/shm has {_size(free)} free"
    if free >= wanted:
        return finding("ok", found)
    return finding(
        "warning",
        f"{found}, so that Ray keeps objects in {ray_temp_folder()}, which is slower",
        f"free some, or give a container more (docker run --shm-size={math.ceil(wanted / 1e9)}g)",
    )


def check_memory() -> Finding:
    """Check that Ray, a driver and a worker fit into the memory that this machine has free."""
    free, finding = available_memory(), partial(Finding, "memory", socket.gethostname())
    found = f"{_size(free)} of memory are free"
    if free >= MIN_MEMORY:
        return finding("ok", found)
    found += f", and Ray with one worker needs {_size(MIN_MEMORY)}"
    return finding("failure", found, "end other programs, or give the container more")


def check_local_ray() -> Iterator[str]:
    """Yield what the user should know of this machine before Ray starts on it.

    Raises:
        UserError: Ray could not run here.
    """
    for finding in check_machine_for_ray():
        if finding.state == "failure":
            raise UserError(f"Ray cannot start here: {finding}")
        if finding.state == "warning":
            yield str(finding)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
