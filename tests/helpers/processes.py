"""Processes that a test started."""

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

Found = TypeVar("Found")


def wait_for(
    condition: Callable[[], Found], what: str, pause: float = 0.02, seconds: float = 300
) -> Found:
    """Wait until a condition holds and return its value; fail after so many seconds."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"timeout: {what}"
        time.sleep(pause)
    return found


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for does not."""
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def children(pid: int) -> Iterator[tuple[int, str]]:
    """Yield the id and command line of every descendant of a process."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "status").read_text()
                title = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            parent = re.search(r"PPid:\s+(\d+)", status)
            if parent and int(parent.group(1)) == pid:
                yield int(entry.name), title
                yield from children(int(entry.name))
