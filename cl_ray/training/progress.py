"""The progress line, for a terminal or a log file."""

import time
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.text import Text

LOG_EVERY = 10.0
"""Seconds between two progress lines where there is no terminal."""


SHORT = {
    "d/adversarial": "D",
    "d/contrastive": "contrast",
    "g/adversarial": "G",
    "g/reconstruction": "recon",
    "score/real": "real",
    "score/fake": "fake",
}
"""The metrics in the line, and what they are called there."""


class TrainingProgress:
    """Shows where a run stands.

    Args:
        console: Where to print.
        epochs: Epochs of the whole run.
    """

    def __init__(self, console: Console, epochs: int):
        self.console, self.epochs = console, epochs
        self.live = Live(console=console, refresh_per_second=4, transient=True)
        self.shown = 0.0
        self.last: dict[str, Any] = {}

    def __enter__(self) -> "TrainingProgress":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.console.is_terminal:
            self.live.stop()

    def note(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, highlight=False, soft_wrap=True)

    def show(self, progress: dict[str, Any]) -> None:
        """Replace the line; finished epochs leave theirs behind."""
        if not progress or progress == self.last:
            return
        finished = self.last and progress["epoch"] > self.last["epoch"]
        self.last = progress
        line = self.line(progress)
        if finished:
            self.note(line)
        elif self.console.is_terminal:
            self.live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        elif progress["speed"] and time.monotonic() - self.shown > LOG_EVERY:
            self.note(line)
            self.shown = time.monotonic()

    def line(self, progress: dict[str, Any]) -> str:
        """The progress in words."""
        done = progress["epoch"] + progress["position"] / progress["steps"]
        number = progress["epoch"] + (1 if progress["position"] else 0)
        parts = [
            f"epoch {max(1, number)}/{self.epochs}",
            f"step {progress['step']:,}",
            f"{progress['speed']:,.0f} images/s",
        ]
        metrics = progress["metrics"]
        parts += [f"{SHORT[k]} {v:.3f}" for k, v in metrics.items() if k in SHORT]
        if progress["speed"]:
            images = progress["steps"] * progress["batch_size"] * (self.epochs - done)
            parts.append(f"{format_duration(images / progress['speed'])} left")
        return "  ".join(parts)


def format_duration(seconds: float) -> str:
    """12.3 s, 4:56 or 1:02:03."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def pluralize(number: int, what: str) -> str:
    """1 epoch, 1,000 epochs."""
    return f"{number:,} {what}" if number == 1 else f"{number:,} {what}s"
