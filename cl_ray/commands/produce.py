"""What `generate` and `embed` share: a pool of model actors, started and shown."""

import os
from typing import Any

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tyro.conf import Positional

from cl_ray.inference import Work, produce
from cl_ray.model import Model


class PoolCommand(Model):
    """A run, a place for what is made, and the models at work."""

    run: Positional[str] = Field(description="Run folder or its URI.")
    out: str = Field(
        description="Folder or URI. A name that ends in .parquet becomes a folder of Parquet files "
        "that reads as one table, any other a folder of PNG files."
    )
    checkpoint: str = Field("last", description="`last`, `best` or a checkpoint's name.")
    actors: int = Field(1, ge=1, description="Most models at work at once.")
    cpus_per_actor: float = Field(1.0, gt=0, description="CPUs of each.")
    gpus_per_actor: float = Field(0.0, ge=0, description="GPUs of each, a fraction allowed.")
    overwrite: bool = Field(False, description="Replace what is at `out`.")
    address: str | None = Field(
        None, description="Ray cluster to join; None starts Ray here, or obeys RAY_ADDRESS."
    )
    verbose: bool = Field(False, description="Show Ray's messages.")


def produce_here(pool: PoolCommand, work: Work) -> None:
    """Start or join Ray, make everything, and say where it lies."""
    from cl_ray.training.cluster import running_ray

    console = Console()
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    with (
        running_ray(pool.address, False, pool.verbose, console),
        Progress(*columns, TimeRemainingColumn(), console=console) as bar,
    ):
        task = bar.add_task("images", total=work.rows())

        def show(done: int, total: int) -> None:
            bar.update(task, completed=done, total=total)

        record = produce(
            located(pool.run),
            work,
            pool.out,
            checkpoint=pool.checkpoint,
            actors=pool.actors,
            cpus=pool.cpus_per_actor,
            gpus=pool.gpus_per_actor,
            overwrite=pool.overwrite,
            progress=show,
        )
    console.print(summary(record, pool.out), highlight=False, soft_wrap=True)


def located(run: str) -> str:
    """The run's place as an actor with another working folder finds it."""
    return run if "://" in run else os.path.abspath(os.path.expanduser(run))


def summary(record: dict[str, Any], out: str) -> str:
    """What was made, in a line."""
    return f"{record['rows']:,} images of {record['run']} ({record['checkpoint']}) are in {out}"
