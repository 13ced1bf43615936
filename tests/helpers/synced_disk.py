"""What a power cut leaves of a folder: what was synced, and of the rest what the disk happened on.

`record` wraps `os.fsync` in a process and writes down what each call brought to the disk: the
content of a file, or the names in a folder. `cut_power` rebuilds the folder from that. The names
that changed since their folder was synced are the old or the new ones, each at random, and a file
has the content that was last synced, with a random part of what was written later.
"""

import hashlib
import json
import os
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


def record(root: Path, log: Path) -> None:
    """Write down what this process syncs under a folder. Uses the standard library only."""
    fsync = os.fsync

    def recorded(fd: Any) -> None:
        fsync(fd)
        number = fd if isinstance(fd, int) else fd.fileno()
        path = Path(os.readlink(f"/proc/self/fd/{number}"))
        if path == root or root in path.parents:
            _write_down(path, log)

    os.fsync = recorded


def record_all(root: Path, log: Path) -> None:
    """Write down that all of a folder is on the disk."""
    folders = [root, *filter(Path.is_dir, root.rglob("*"))]
    for path in (*filter(Path.is_file, root.rglob("*")), *folders):
        _write_down(path, log)


def _write_down(path: Path, log: Path) -> None:
    event: dict[str, Any] = {"path": str(path), "inode": path.stat().st_ino}
    log.mkdir(exist_ok=True)
    if path.is_dir():
        with os.scandir(path) as entries:
            event["names"] = {entry.name: entry.inode() for entry in entries}
    else:
        blob = path.read_bytes()
        event["blob"] = hashlib.sha256(blob).hexdigest()
        (log / event["blob"]).write_bytes(blob)
    with (log / "events.jsonl").open("a") as events:
        events.write(json.dumps(event) + "\n")


@dataclass
class _Disk:
    """The names in each synced folder, and the content of each synced file.

    By inode, and for folders by name as well: the inode of a deleted one may be used again.
    """

    names: dict[tuple[int, str], dict[str, tuple[int, bytes]]] = field(default_factory=dict)
    content: dict[int, bytes] = field(default_factory=dict)

    @classmethod
    def read(cls, log: Path) -> "_Disk":
        disk = cls()
        lines = (log / "events.jsonl").read_text().splitlines()
        for event in map(json.loads, lines):
            inode, name = event["inode"], Path(event["path"]).name
            if "names" in event:
                named = event["names"].items()
                names = {n: (i, disk.content.get(i, b"")) for n, i in named}
                disk.names[inode, name] = names
                continue
            disk.content[inode] = (log / event["blob"]).read_bytes()
            for names in disk.names.values():  # a synced name keeps its file, if that is the same
                if names.get(name, (0, b""))[0] == inode:
                    names[name] = inode, disk.content[inode]
        return disk


def cut_power(root: Path, log: Path, out: Path, seed: int) -> None:
    """Rebuild in `out` what a power cut leaves of `root`, whose processes are dead by now."""
    _rebuild(root, root.stat().st_ino, _Disk.read(log), out, random.Random(seed))


def _rebuild(live: Path | None, inode: int, disk: _Disk, out: Path, rng: random.Random) -> None:
    """Rebuild a folder from its synced names and, unless it was deleted, its present ones."""
    out.mkdir(parents=True)
    synced = disk.names.get((inode, out.name if live is None else live.name), {})
    present = {path.name: path for path in live.iterdir()} if live else {}
    for name in sorted(synced.keys() | present):
        old, new = synced.get(name), present.get(name)
        if new is not None and (
            (old is not None and old[0] == new.stat().st_ino) or rng.random() < 0.5
        ):
            number = new.stat().st_ino
            if new.is_dir():
                _rebuild(new, number, disk, out / name, rng)
            else:
                kept, now = disk.content.get(number, b""), new.read_bytes()
                end = rng.choice([len(kept), rng.randint(0, len(now)), len(now)])
                later = now[len(kept) : end] if now.startswith(kept) else b""
                (out / name).write_bytes(kept + later)
        elif old is not None and (old[0], name) in disk.names:
            _rebuild(None, old[0], disk, out / name, rng)
        elif old is not None:
            (out / name).write_bytes(old[1])
