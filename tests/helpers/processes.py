"""Processes that a test started."""

import re
from collections.abc import Iterator
from pathlib import Path


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
