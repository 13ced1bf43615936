"""Ends what a local Ray leaves when its driver is killed.

Ray's servers end with the driver. Its workers and agents look for them: workers end within seconds,
in which they write on, and agents and some actors may stand for minutes and hold their memory. Here
a process of its own, which starts this file, waits for the driver's end and kills them.
"""

import contextlib
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def session_watcher(temp_folder: Path) -> Iterator[None]:
    """Kill the processes of the Ray session that starts meanwhile when this process dies.

    Also at the end of the context, by which Ray is shut down. In Ray's temporary folder the session
    has a folder with this process's id.
    """
    session = rf"{re.escape(os.path.realpath(temp_folder))}/session_[\d_-]+_{os.getpid()}/"
    with subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(os.getpid()), session],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # so that neither Ctrl-C nor a closed terminal ends it
    ):
        yield  # the end of its input is that of the context


def session_processes(session: str) -> set[int]:
    """Return the ids of processes that write to files in the folder of this regular expression."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            for file in (process / "fd").iterdir():
                if re.match(session, os.readlink(file)) and _is_writable(process, file.name):
                    found.add(int(process.name))
                    break
    return found


def _is_writable(process: Path, descriptor: str) -> bool:
    flags = re.search(r"flags:\s+(\d+)", (process / "fdinfo" / descriptor).read_text())
    return bool(flags and int(flags[1], 8) & os.O_ACCMODE)


def _watch(driver: int, session: str) -> None:
    while os.getppid() == driver and not select.select([sys.stdin], [], [], 0.1)[0]:
        pass  # the end of the input alone would wait for any process that has inherited the pipe
    while left := session_processes(session) - {driver}:
        for process in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.1)  # one may have started another just before


if __name__ == "__main__":
    _watch(int(sys.argv[1]), sys.argv[2])
