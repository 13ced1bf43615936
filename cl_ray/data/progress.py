"""What people see of `cl-ray data`: how far it is, and what it wrote."""

import shlex
import time

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn
from rich.text import Text

from cl_ray.data.dataset import DatasetInfo, absolute_location, without_secrets
from cl_ray.errors import redact_credentials

LOG_INTERVAL = 10.0
"""Seconds between two lines of progress where there is no terminal."""
NAMED = 10
"""Classes that are listed by name."""


class DatasetProgress:
    """How far each stage is: a bar in a terminal, else a line when it is over or takes long.

    Args:
        console: Where to print.
    """

    def __init__(self, console: Console):
        self.console = console
        count = TextColumn("{task.completed:,.0f} images")
        self.bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            count,
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.tasks: dict[str, TaskID] = {}
        self.said = time.monotonic()

    def __enter__(self) -> "DatasetProgress":
        self.bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.bars.stop()

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Show that `done` images of `total` (None: unknown) went through `stage`."""
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total)
        self.bars.update(self.tasks[stage], completed=done, total=total)
        over = done == total
        if not self.console.is_terminal and (over or time.monotonic() - self.said > LOG_INTERVAL):
            self.said = time.monotonic()
            of = "" if over or total is None else f" of {total:,}"
            self.console.print(f"{stage}: {done:,}{of} images", highlight=False, soft_wrap=True)


def print_dataset_summary(info: DatasetInfo, out: str, console: Console) -> None:
    """Print what was written to `out`, and what to do with it."""
    height, width, channels = info.shape
    facts = {
        "data set": info.name,
        "source": info.source,
        "licence": info.licence or "not stated",
        "images": f"{width} × {height}, {'grey' if channels == 1 else 'colour'}",
        "classes": _classes(info),
    }
    for name, split in info.splits.items():
        files = f"{len(split.shards)} file{'s' if len(split.shards) > 1 else ''}"
        size = decimal(sum(shard.bytes for shard in split.shards))
        facts[name] = f"{split.rows:,} images in {files}, {size}"
    facts["where"] = without_secrets(absolute_location(out))
    facts["next"] = f"cl-ray train --data {shlex.quote(redact_credentials(out))}"
    for name, fact in facts.items():
        line = Text.assemble((f"{name:<10}", "bold"), fact)
        console.print(line, soft_wrap=True, highlight=False)


def _classes(info: DatasetInfo) -> str:
    if not info.labelled:
        return "none"
    if info.classes is None:
        return "by number, without names"
    more = ", …" if len(info.classes) > NAMED else ""
    return f"{len(info.classes)}: {', '.join(info.classes[:NAMED])}{more}"
