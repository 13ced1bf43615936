"""A command in a terminal of its own, which Ctrl-C is pressed in."""

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path


class Running:
    """A command that runs.

    Args:
        command: What to start.
        log: Where its output goes.
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

    def said(self) -> str:
        """What it printed so far."""
        return self.log.read_text()

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Until something is so, while it runs."""
        deadline = time.monotonic() + 400
        while not condition():
            assert self.process.poll() is None, f"it ended before {what}: {self.said()}"
            assert time.monotonic() < deadline, f"in vain for {what}: {self.said()}"
            time.sleep(0.02)

    def press_ctrl_c(self) -> None:
        """To all that the terminal started, Ray's processes among them."""
        os.killpg(self.process.pid, signal.SIGINT)

    def end(self) -> str:
        """Wait for its end as one that was stopped; all that it printed."""
        assert self.process.wait(timeout=120) == 130, self.said()
        return self.said()
