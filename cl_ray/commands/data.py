"""`cl-ray data`: turn a folder, archive, Parquet, arrays or torchvision data into a dataset."""

import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from cl_ray.cli import EXIT_INTERRUPTED, parse_flags
from cl_ray.console import PlainConsole, print_fields, print_line
from cl_ray.data.dataset import DatasetInfo
from cl_ray.environment import return_freed_memory
from cl_ray.errors import pluralize
from cl_ray.signals import interrupt_kept
from cl_ray.storage import absolute_location, without_options

_LOG_INTERVAL = 10.0
"""Seconds between two lines of progress where there is no terminal."""
_ENCODINGS = {
    "raw": "raw pixels",
    "png": "PNG, lossless",
    "webp": "WebP, lossless",
    "jpeg": "JPEG, lossy",
}
"""How the summary calls them."""
LISTED_CLASSES = 10
"""Classes that the summary lists by name."""


def command(arguments: Sequence[str]) -> None:
    """Run the command with its arguments."""
    from cl_ray.data.source_config import SourceConfig

    source = parse_flags(SourceConfig, arguments, prog="cl-ray data")
    from cl_ray.data.sources import write_dataset
    from cl_ray.training.preflight import check_outlives_job

    return_freed_memory()
    check_outlives_job(source.out, "out")
    console = PlainConsole()
    try:
        with interrupt_kept(), DatasetProgress(console) as progress:
            info = write_dataset(source, progress.report, partial(print_line, console))
    except KeyboardInterrupt:
        print("cl-ray: stopped; no dataset was written.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    print_dataset_summary(info, source.out, console)


class DatasetProgress(Progress):
    """The progress of each stage: a bar in a terminal, else a line at its end and now and then."""

    def __init__(self, console: Console):
        super().__init__(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.completed:,.0f} images", markup=False),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.stages: dict[str, TaskID] = {}
        self.last_line = time.monotonic()

    def report(self, stage: str, done: int, total: int | None) -> None:
        """Show that `done` images of `total` (None: unknown) went through `stage`."""
        if stage not in self.stages:
            self.stages[stage] = self.add_task(stage, total=total)
        self.update(self.stages[stage], completed=done, total=total)
        now, finished = time.monotonic(), done == total
        if not self.console.is_terminal and (finished or now - self.last_line > _LOG_INTERVAL):
            self.last_line = now
            of = "" if finished or total is None else f" of {total:,}"
            images = "images" if (total or done) > 1 else "image"
            print_line(self.console, f"{stage}: {done:,}{of} {images}")


def print_dataset_summary(info: DatasetInfo, out: str, console: Console) -> None:
    """Print what was written to `out`, and the command that trains on it."""
    height, width, channels = info.shape
    lines = {
        "dataset": info.name,
        "source": info.source,
        "licence": info.licence or "not stated",
        "images": f"{width} × {height}, {'grey' if channels == 1 else 'colour'}",
        "encoding": _ENCODINGS[info.encoding],
        "classes": _format_classes(info),
    }
    if info.predicted_labels:
        lines["labels"] = f"of training images, {info.predicted_labels}"
    for name, split in info.splits.items():
        images, files = pluralize(split.rows, "image"), pluralize(len(split.shards), "file")
        size = decimal(sum(shard.bytes for shard in split.shards))
        unlabelled = f", {split.unlabelled:,} without a label" if split.unlabelled else ""
        lines[name] = f"{images} in {files}, {size}{unlabelled}"
    lines["where"] = without_options(absolute_location(out))
    lines["next"] = f"cl-ray train --data {shlex.quote(out)}"
    print_fields(console, lines, max(10, *(len(name) + 1 for name in lines)))


def _format_classes(info: DatasetInfo) -> str:
    if not info.labelled:
        return "none"
    if info.classes is None:
        return "by number, without names"
    more = ", …" if len(info.classes) > LISTED_CLASSES else ""
    return f"{len(info.classes)}: {', '.join(info.classes[:LISTED_CLASSES])}{more}"
