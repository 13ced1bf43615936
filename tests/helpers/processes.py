"""Processes that a test started."""

import re
from collections.abc import Iterator
from pathlib import Path


def children(pid: int) -> Iterator[tuple[int, str]]:
    """All descendants of a process, with their titles."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                status = (entry / "status").read_text()
                title = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:
                continue
            parent = int(re.search(r"PPid:\s+(\d+)", status).group(1))  # type: ignore[union-attr]
            if parent == pid:
                yield int(entry.name), title
                yield from children(int(entry.name))
