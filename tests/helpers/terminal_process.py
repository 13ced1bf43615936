"""A command that runs as in a terminal of its own, with Ctrl-C."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


class TerminalProcess:
    """A running command.

    Args:
        command: The command with its arguments.
        log: File for its output.
    """

    def __init__(self, command: list[str], log: Path):
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command,
                stdout=out,
                stderr=out,
                env={**os.environ, "COLUMNS": "160"},
                start_new_session=True,
            )

    def output(self) -> str:
        """Return the output so far."""
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait until a condition holds, while the command runs."""
        deadline = time.monotonic() + 400
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}: {self.output()}"
            assert time.monotonic() < deadline, f"timeout before {what}: {self.output()}"
            time.sleep(0.02)

    def press_ctrl_c(self) -> None:
        """Send SIGINT to all processes of the terminal, Ray's included."""
        os.killpg(self.process.pid, signal.SIGINT)

    def wait_interrupted(self) -> str:
        """Wait until the command ends as an interrupted one; return its output."""
        assert self.process.wait(timeout=120) == 130, self.output()
        return self.output()
