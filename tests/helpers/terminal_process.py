"""A command that runs as in a terminal of its own, with Ctrl-C and the end of the terminal."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import subprocess
import termios
import threading
from collections.abc import Callable
from pathlib import Path

from helpers.processes import wait_for


class TerminalProcess:
    """A running command.

    Args:
        command: The command with its arguments.
        log: File for its output.
        terminal: Whether it has a terminal, which can be closed; else its output is the file.
    """

    def __init__(self, command: list[str], log: Path, terminal: bool = False):
        self.log = log
        self._master, slave = pty.openpty() if terminal else (-1, -1)
        self._closed = threading.Event()
        environment = {**os.environ, "COLUMNS": "160"}
        with log.open("wb") as out:
            output = slave if terminal else out
            self.process = subprocess.Popen(
                command,
                stdin=slave if terminal else None,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
                preexec_fn=(lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0)) if terminal else None,
            )
        if terminal:
            os.close(slave)
            self._reader = threading.Thread(target=self._read, daemon=True)
            self._reader.start()

    def _read(self) -> None:
        with self.log.open("ab", buffering=0) as log, contextlib.suppress(OSError):
            while not self._closed.is_set():
                if select.select([self._master], [], [], 0.05)[0]:
                    log.write(os.read(self._master, 1 << 16))

    def output(self) -> str:
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition holds, while the command runs."""

        def holds() -> bool:
            assert self.process.poll() is None, f"it ended before {what}: {self.output()}"
            return bool(condition())

        wait_for(holds, what, seconds=400)

    def press_ctrl_c(self) -> None:
        """Send SIGINT to all processes of the terminal, Ray's included."""
        os.killpg(self.process.pid, signal.SIGINT)

    def close_terminal(self) -> None:
        """Close the terminal: the kernel sends SIGHUP to the command, a shell to all of its group.

        What is written there from now on is an error.
        """
        self._closed.set()
        self._reader.join()
        os.close(self._master)
        os.killpg(self.process.pid, signal.SIGHUP)

    def wait_interrupted(self) -> str:
        """Wait until the command ends as an interrupted one; return its output."""
        assert self.process.wait(timeout=400) == 130, self.output()
        return self.output()
