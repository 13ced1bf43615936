"""One process at a time writes a run's or a search's folder."""

import contextlib
import fcntl
import hashlib
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from cl_ray.errors import UserError, redact_credentials
from cl_ray.storage import RunStorage


@contextlib.contextmanager
def exclusive_lock(folder: RunStorage, what: str) -> Iterator[None]:
    """Hold the folder; a process that is killed lets go of it.

    An object store has no locks. There the lock lies on this machine, and the processes of one
    machine see each other: so do the jobs of a cluster, whose commands all run on its head.

    Args:
        folder: The folder, which is there.
        what: What it holds: `run` or `search`.

    Raises:
        UserError: Another process holds it.
    """
    with open(_file(folder), "a+", opener=_private) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.seek(0)
            raise UserError(
                f"The {what} {folder} runs in another process ({lock.read() or 'not named'}): "
                "wait for it or end it, or take another --name."
            ) from error
        except OSError:  # a file system without locks, such as some that are mounted
            yield
            return
        lock.truncate(0)
        lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        lock.flush()
        yield


def _file(folder: RunStorage) -> Path:
    """The file that is locked; it stays, as one that is deleted could be locked twice."""
    if not folder.remote:
        return Path(folder.uri) / ".lock"
    place = hashlib.sha256(redact_credentials(folder.uri).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"cl_ray-{os.getuid()}-{place}.lock"


def _private(path: str, flags: int) -> int:
    """Opens a file, and no link that somebody else has put there."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o600)
