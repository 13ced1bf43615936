"""Fake machines: each a set of namespaces with its own address, processes and disk.

Needs root, and Debian's openssh-server, openssh-client, rsync and iproute2.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from hashlib import md5
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GATEWAY = "10.77.0.254"
BRIDGE = "clray"
PROGRAMS = ("ip", "unshare", "sshd", "ssh", "rsync", "chroot", "useradd")


def missing_requirement() -> str | None:
    """Return why fake machines cannot run here; None if they can."""
    if os.geteuid() != 0:
        return "fake machines need root"
    paths = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=paths)]
    if missing:
        return f"not installed: {', '.join(missing)} (openssh-server, rsync, iproute2)"
    if subprocess.run(["unshare", "-m", "-n", "-p", "--fork", "true"]).returncode:
        return "fake machines need Linux namespaces, which are not allowed here"
    return None


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, stderr=None if check else subprocess.DEVNULL)


class Machines:
    """A bridge and the machines that are connected to it.

    Args:
        folder: Scratch folder.
        environment: `AWS_*` variables of every machine.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.shared = folder / "shared"
        """Mounted as /mnt/runs on every machine."""
        self.shared.mkdir(parents=True)
        self.shared.chmod(0o777)
        self.running: dict[str, tuple[subprocess.Popen[bytes], tuple[str, ...]]] = {}
        ip("link", "del", BRIDGE, check=False)  # left by a killed test
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")

    def boot(self, name: str, key: str, user: str, *addresses: str) -> None:
        """Start a machine that admits the owner of the public key; the first address is its own."""
        namespace, link = f"clray-{name}", _link_name(name)
        ip("netns", "del", namespace, check=False)
        ip("link", "del", link, check=False)  # it outlives a namespace by seconds
        ip("netns", "add", namespace)
        ip("link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", namespace)
        ip("link", "set", link, "master", BRIDGE, "up")
        for device in ("lo", "eth0"):
            ip("-n", namespace, "link", "set", device, "up")
        for number, address in enumerate(addresses):
            # Neighbours are on the link of the first address.
            ip("-n", namespace, "addr", "add", f"{address}/{32 if number else 16}", "dev", "eth0")
            ip("route", "replace", f"{address}/32", "dev", BRIDGE)
        ip("-n", namespace, "route", "replace", "default", "via", GATEWAY, "dev", "eth0", "onlink")
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "authorized_keys").write_text(f"{key}\n")
        arguments = [str(folder), name, user, str(ROOT), sys.prefix, sys.base_prefix]
        inside = f"ip netns exec {namespace} unshare -m -p -u -i --fork --kill-child --".split()
        log_file = self.folder / f"{name}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [*inside, "bash", str(Path(__file__).parent / "machine.sh"), *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.running[name] = process, addresses

    def kill(self, name: str) -> None:
        """Kill a machine: all its processes end at once, and its disk is gone."""
        process, addresses = self.running.pop(name)
        ip("link", "set", _link_name(name), "down", check=False)  # so that it closes no connection
        process.kill()  # `unshare`: the kernel ends its whole process namespace
        process.wait()
        time.sleep(0.3)
        ip("netns", "del", f"clray-{name}", check=False)
        for address in addresses:
            ip("route", "del", f"{address}/32", check=False)

    def processes(self, name: str) -> list[str]:
        """The command lines of a machine's processes."""
        process, _ = self.running[name]
        return [" ".join(words) for _, words in processes_beside(first_process(process.pid))]

    def close(self) -> None:
        """Kill all machines and remove the bridge."""
        for name in list(self.running):
            self.kill(name)
        ip("link", "del", BRIDGE, check=False)


def _link_name(name: str) -> str:
    """The bridge's link to a machine; the kernel allows 15 characters."""
    return f"cl{md5(name.encode()).hexdigest()[:8]}"


def first_process(pid: int) -> int:
    """The pid, in this namespace, of process 1 of the machine that `unshare` started."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


def processes_beside(pid: int) -> Iterator[tuple[Path, list[str]]]:
    """Yield the folder in /proc and the command line of each process in that one's namespace."""
    namespace = os.readlink(f"/proc/{pid}/ns/pid")
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            if os.readlink(folder / "ns" / "pid") == namespace:
                yield folder, (folder / "cmdline").read_bytes().decode().split("\0")


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
