"""Machines on this machine: each a network namespace with its own address, processes and disk.

Needs root, and Debian's openssh-server, openssh-client, rsync and iproute2.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from hashlib import md5
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
GATEWAY = "10.77.0.254"
BRIDGE = "clray"
PROGRAMS = ("ip", "unshare", "sshd", "ssh", "rsync", "chroot", "useradd")


def missing() -> str | None:
    """Why machines cannot be started here; None if they can."""
    if os.geteuid() != 0:
        return "fake machines need root"
    paths = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    absent = [program for program in PROGRAMS if not shutil.which(program, path=paths)]
    if absent:
        return f"not installed: {', '.join(absent)} (openssh-server, rsync, iproute2)"
    if subprocess.run(["unshare", "-m", "-n", "-p", "--fork", "true"]).returncode:
        return "no namespaces may be made here"
    return None


def ip(*arguments: str, check: bool = True) -> None:
    subprocess.run(["ip", *arguments], check=check, stderr=None if check else subprocess.DEVNULL)


class Machines:
    """A bridge, and the machines that hang on it.

    Args:
        folder: Scratch folder.
        environment: What every machine finds set of `AWS_*`.
    """

    def __init__(self, folder: Path, environment: dict[str, str]):
        self.folder, self.environment = folder, environment
        self.shared = folder / "shared"
        """What every machine sees as /mnt/runs."""
        self.shared.mkdir(parents=True)
        self.shared.chmod(0o777)
        self.running: dict[str, tuple[subprocess.Popen[bytes], tuple[str, ...]]] = {}
        ip("link", "del", BRIDGE, check=False)  # of a test that was killed
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")

    def boot(self, name: str, key: str, user: str, *addresses: str) -> None:
        """Start one that lets the owner of the public key in; the first address is its own."""
        space, cable = f"clray-{name}", cable_of(name)
        ip("netns", "del", space, check=False)
        ip("netns", "add", space)
        ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
        ip("link", "set", cable, "master", BRIDGE, "up")
        for link in ("lo", "eth0"):
            ip("-n", space, "link", "set", link, "up")
        for number, address in enumerate(addresses):
            # The first one sees its neighbours on the link itself.
            ip("-n", space, "addr", "add", f"{address}/{32 if number else 16}", "dev", "eth0")
            ip("route", "replace", f"{address}/32", "dev", BRIDGE)
        ip("-n", space, "route", "replace", "default", "via", GATEWAY, "dev", "eth0", "onlink")
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "authorized_keys").write_text(f"{key}\n")
        arguments = [str(folder), name, user, str(ROOT), sys.prefix, sys.base_prefix]
        inside = f"ip netns exec {space} unshare -m -p -u -i --fork --kill-child --".split()
        log_file = self.folder / f"{name}.log"
        with log_file.open("wb") as log:
            process = subprocess.Popen(
                [*inside, "bash", str(Path(__file__).parent / "machine.sh"), *arguments],
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        self.running[name] = process, addresses

    def unplug(self, name: str) -> None:
        """Pull its plug: every process of it is gone at once, and its disk with it."""
        process, addresses = self.running.pop(name)
        ip("link", "set", cable_of(name), "down", check=False)  # or it would say goodbye
        process.kill()  # unshare: the kernel ends all of its process namespace
        process.wait()
        time.sleep(0.3)
        ip("netns", "del", f"clray-{name}", check=False)
        for address in addresses:
            ip("route", "del", f"{address}/32", check=False)

    def processes(self, name: str) -> list[str]:
        """The command lines of what runs on it."""
        process, _ = self.running[name]
        space = os.readlink(f"/proc/{child_of(process.pid)}/ns/pid")
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(folder / "ns" / "pid") == space:
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
        return found

    def close(self) -> None:
        """Unplug all of them, and the bridge."""
        for name in list(self.running):
            self.unplug(name)
        ip("link", "del", BRIDGE, check=False)


def cable_of(name: str) -> str:
    """A machine's end of the bridge; a link's name is short."""
    return f"cl{md5(name.encode()).hexdigest()[:8]}"


def child_of(pid: int) -> int:
    """The process 1 of a machine, as it is called out here."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return int(children[0])


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and what it started."""
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=10)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
