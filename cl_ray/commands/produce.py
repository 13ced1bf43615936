"""What `generate` and `embed` share: a pool of model actors, started and shown."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING

from pydantic import Field
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cl_ray.base_config import BaseConfig
from cl_ray.cli import INTERRUPTED, RunPath

if TYPE_CHECKING:
    from cl_ray.inference.pool import Job, Made, Pool
    from cl_ray.inference.work import Work

LOG_EVERY = 10.0
"""Seconds between two lines of progress where there is no terminal."""


class ProduceCommand(BaseConfig):
    """A run, a place for what is made, and the models at work."""

    run: RunPath = Field(min_length=1, description="Run folder or its URI.")
    out: str = Field(
        description="Folder or URI. A name that ends in .parquet becomes a folder of Parquet files "
        "that reads as one table, any other a folder of PNG files."
    )
    checkpoint: str = Field("last", description="`last`, `best` or a checkpoint's name.")
    overwrite: bool = Field(
        False,
        description="Replace what another request made at `out`. The same request needs no flag: "
        "it goes on with what is missing.",
    )
    actors: int | None = Field(
        None, ge=1, description="Models at work at once; None is as many as fit."
    )
    cpus_per_actor: float | None = Field(
        None,
        gt=0,
        description="CPUs, and threads, of each; None is 1, or this machine's CPUs for each of "
        "its GPUs.",
    )
    gpus_per_actor: float | None = Field(
        None,
        ge=0,
        description="GPUs of each, a fraction allowed. None: 1 if this machine has one; on a "
        "cluster none is used unless asked for.",
    )
    address: str | None = Field(
        None, description="Ray cluster to join; None starts Ray here, or obeys RAY_ADDRESS."
    )
    verbose: bool = Field(False, description="Show Ray's messages.")


def produce_here(asked: ProduceCommand, work: "Work") -> None:
    """See that it can be done, start or join Ray, make all that is missing, and say so."""
    import ray.data  # noqa: F401  # which sets up its loggers, before they are made quiet

    from cl_ray.inference.pool import prepare, produce, share_out
    from cl_ray.storage import RunStorage
    from cl_ray.training.cluster import check_shared_storage, ray_session
    from cl_ray.training.preflight import check_machine_has, starts_local_ray

    if starts_local_ray(asked.address):
        check_machine_has(asked.cpus_per_actor, asked.gpus_per_actor, "actor")
    console = Console()
    job = prepare(
        asked.run, work, asked.out, checkpoint=asked.checkpoint, overwrite=asked.overwrite
    )
    if not job.missing:
        say(console, f"{what(job)} are in {where(job)} already.")
        return
    if job.note:
        say(console, job.note)
    if job.done:
        say(console, f"{job.done:,} of {what(job)} are in {job.output} already: going on.")
    made: Made | None = None
    begun = time.monotonic()
    try:
        with ray_session(asked.address, False, asked.verbose, console) as local:
            if job.output.local:
                check_shared_storage(RunStorage.of(job.output.location), "out")
            each = asked.cpus_per_actor, asked.gpus_per_actor
            pool = share_out(asked.actors, *each, local, len(job.missing))
            say(console, f"{job.checkpoint} of {asked.run} by {actors(pool)}")
            with InferenceDisplay(console, job) as display:
                for made in produce(job, pool):
                    display.show(made)
            ended = time.monotonic()
    except KeyboardInterrupt:
        there = job.done + (made.images if made else 0)
        print(
            f"cl-ray: stopped; {there:,} of {what(job)} are in {job.output}, and the same command "
            "goes on.",
            file=sys.stderr,
        )
        sys.exit(INTERRUPTED)
    assert made is not None
    pace = f"{made.images / made.seconds:,.0f} images/s for {made.seconds:.1f} s"
    if made.seconds < 0.1:  # of so few a speed says nothing
        pace = "made in under 0.1 s"
    start = ended - begun - made.seconds
    say(
        console,
        f"{what(job)} are in {where(job)}: {pace}, after "
        f"{start:.1f} s of starting; the largest actor held {decimal(made.peak)}.",
    )


class InferenceDisplay:
    """How far it is: a bar in a terminal, else a line every LOG_EVERY seconds.

    Args:
        console: Where to print.
        job: What is being made.
    """

    def __init__(self, console: Console, job: "Job"):
        self.console, self.job = console, job
        self.bar = Progress(
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task(
            "starting the actors", total=job.work.total, completed=job.done
        )
        self.said = time.monotonic()

    def __enter__(self) -> "InferenceDisplay":
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.bar.stop()

    def show(self, made: "Made") -> None:
        """Show what is there now."""
        there = self.job.done + made.images
        line = f"{there:,} of {what(self.job)}  {made.images / made.seconds:,.0f} images/s"
        self.bar.update(self.task, completed=there, description=line)
        if not self.console.is_terminal and time.monotonic() - self.said > LOG_EVERY:
            self.said = time.monotonic()
            say(self.console, line)


def say(console: Console, line: str) -> None:
    """Print a line as it is."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def what(job: "Job") -> str:
    """10,000 images."""
    kind = "embeddings" if job.record["verb"] == "embed" else "images"
    return f"{job.work.total:,} {kind}"


def where(job: "Job") -> str:
    """The folder, and what it is."""
    if not job.output.parquet:
        return f"{job.output}, as PNG files"
    return f"{job.output}, a folder of Parquet files that reads as one table"


def actors(pool: "Pool") -> str:
    """2 actors, 1 CPU each."""
    each = f"{pool.cpus:g} CPU" + (f" and {pool.gpus:g} GPU" if pool.gpus else "")
    more = "; --actors asks the autoscaler for room for more" if pool.more else ""
    return f"{pool.actors} actor{'s' if pool.actors > 1 else ''}, {each} each{more}"
