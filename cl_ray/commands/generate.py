"""`cl-ray generate`: samples, or variants of given images. Also what `cl-ray embed` shares."""

import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field, model_validator
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from cl_ray.base_config import BaseConfig
from cl_ray.cli import EXIT_INTERRUPTED, RunPath, parse_flags
from cl_ray.console import PlainConsole
from cl_ray.signals import interrupt_kept, termination_as_interrupt

if TYPE_CHECKING:
    from cl_ray.inference.actor_pool import InferenceJob, InferenceProgress
    from cl_ray.inference.tasks import InferenceTask
    from cl_ray.model import TrainedModel

COUNT, SPLIT, COPIES, DISTANCE = 1000, "train", 1, 0.7
"""Defaults of flags whose absence is checked."""
IN_PROCESS_ROWS = 20_000
"""Most rows that are computed without Ray, which takes ten seconds to start."""
LOG_INTERVAL = 10.0
"""Seconds between two lines of progress where there is no terminal."""


class InferenceCommand(BaseConfig):
    """A run, an output folder and the model actors."""

    run: RunPath = Field(min_length=1, description="Run folder or its URI.")
    out: str = Field(
        description="Folder or URI. A name that ends in .parquet becomes a folder of Parquet files "
        "that reads as one table, any other a folder of PNG files."
    )
    checkpoint: str = Field("last", description="`last`, `best` or a checkpoint's name.")
    overwrite: bool = Field(
        False,
        description="Replace the results of another request in `out`. The same request needs no "
        "flag: it resumes with the parts that are missing.",
    )
    actors: int | None = Field(
        None,
        ge=1,
        description="Model actors that work at once. None is as many as fit; on this machine, up "
        f"to {IN_PROCESS_ROWS:,} images are computed without actors and Ray.",
    )
    cpus_per_actor: float | None = Field(
        None,
        gt=0,
        description="CPUs, and threads, of each actor; None is 1, or this machine's CPUs divided "
        "by its GPUs.",
    )
    gpus_per_actor: float | None = Field(
        None,
        ge=0,
        le=1,
        description="GPUs of each actor, 1 or a fraction. None is 1 if this machine has one, "
        "and 0 on a cluster.",
    )
    address: str | None = Field(
        None, description="Ray cluster to join. None: RAY_ADDRESS, or Ray on this machine."
    )
    verbose: bool = Field(False, description="Show Ray's messages.")


class GenerateCommand(InferenceCommand):
    """Generate images: samples, or with --around variants of a dataset's images."""

    count: int | None = Field(None, ge=1, description=f"Images to sample; None is {COUNT:,}.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all randomness.")
    truncation: float | None = Field(
        None,
        ge=0,
        le=1,
        description="For a style-based generator: below 1, samples vary less and look more "
        "typical.",
    )
    label: Annotated[str | None, tyro.conf.arg(name="class")] = Field(
        None,
        description="For a run trained with --condition: sample only this class, by name or "
        "number. None samples all classes, as often as the labelled training images have them.",
    )
    around: str | None = Field(
        None,
        min_length=1,
        description="Generate variants of this dataset's images, with their labels, not samples.",
    )
    split: str | None = Field(None, description=f"Split of that dataset; None is {SPLIT}.")
    copies: int | None = Field(
        None, ge=1, description=f"Variants of each of its images; None is {COPIES}."
    )
    distance: float | None = Field(
        None,
        ge=0,
        description="Standard deviation of the noise added to an image's latent vector, which has "
        f"mean square 1; 0 reconstructs the image. None is {DISTANCE}.",
    )

    @model_validator(mode="after")
    def _check_combination(self) -> "GenerateCommand":
        reasons = {
            "count": (self.count, "--copies says how many variants of each image there are"),
            "truncation": (self.truncation, "variants are not truncated"),
            "class": (self.label, "variants keep their image's class"),
        }
        for name, (value, reason) in reasons.items():
            if self.around is not None and value is not None:
                raise ValueError(f"{name} {value} cannot be combined with --around: {reason}")
        for name in ("split", "copies", "distance"):
            if self.around is None and getattr(self, name) is not None:
                raise ValueError(f"{name} {getattr(self, name)} needs --around DATA")
        return self


def command(arguments: Sequence[str]) -> None:
    """Run `cl-ray generate`."""
    options = parse_flags(GenerateCommand, arguments, prog="cl-ray generate")
    from cl_ray.data.dataset import Dataset
    from cl_ray.inference.tasks import GenerateTask, VariantsTask

    task: InferenceTask
    if options.around is None:
        truncation = 1.0 if options.truncation is None else options.truncation
        task = GenerateTask(options.count or COUNT, options.seed, truncation, options.label)
    else:
        dataset, split = Dataset.open(options.around), options.split or SPLIT
        dataset.row_groups(split)  # raises if there is no such split
        distance = DISTANCE if options.distance is None else options.distance
        task = VariantsTask(dataset, split, options.copies or COPIES, distance, options.seed)
    run_command(options, task)


def run_command(
    options: InferenceCommand, task: "InferenceTask", model: "TrainedModel | None" = None
) -> None:
    """Prepare a task, compute all missing parts, here or by Ray, and print a summary.

    `model`: the checkpoint that the options name, if it is loaded on the CPU already.
    """
    from cl_ray.inference.actor_pool import prepare_inference
    from cl_ray.model import load
    from cl_ray.storage import absolute_location
    from cl_ray.training.preflight import check_local_capacity, check_outlives_job, starts_local_ray

    check_outlives_job(options.out, "out")
    if starts_local_ray(options.address):
        check_local_capacity(options.cpus_per_actor, options.gpus_per_actor, "actor")
    console = PlainConsole(highlight=False, soft_wrap=True)
    model = model or load(absolute_location(options.run), options.checkpoint, "cpu")
    job = prepare_inference(
        options.run,
        task,
        options.out,
        checkpoint=options.checkpoint,
        overwrite=options.overwrite,
        model=model,
    )
    kind = "a folder of Parquet files that reads as one table" if job.output.parquet else "as PNG"
    if not job.missing:
        console.print(f"{job} are in {job.output} already, {kind}.")
        return
    if job.note:
        console.print(job.note)
    if job.rows_written:
        console.print(f"Resuming: {job.rows_written:,} of {job} are in {job.output}.")
    began = time.monotonic()
    try:
        with interrupt_kept():
            progress, ended = _compute(options, job, model, console)
    except KeyboardInterrupt:
        written = job.refresh().rows_written
        print(
            f"cl-ray: stopped; {written:,} of {job} are in {job.output}, and the same command "
            "resumes.",
            file=sys.stderr,
        )
        sys.exit(EXIT_INTERRUPTED)
    startup = ended - began - progress.seconds
    speed = f"{progress.rows / progress.seconds:,.0f} images/s for {progress.seconds:.1f} s"
    if progress.seconds < 0.1:  # too short for a speed
        speed = "computed in under 0.1 s"
    console.print(
        f"{job} are in {job.output}, {kind}: {speed}, after {startup:.1f} s of start-up; the "
        f"largest process took {decimal(progress.peak_memory)} of memory."
    )


def _compute(
    options: InferenceCommand, job: "InferenceJob", model: "TrainedModel", console: Console
) -> tuple["InferenceProgress", float]:
    """Compute all missing parts, few on this machine without Ray; returns also when they ended."""
    from cl_ray.inference.actor_pool import allocate_actors, run_inference
    from cl_ray.storage import RunStorage
    from cl_ray.training.preflight import check_shared_storage, starts_local_ray
    from cl_ray.training.ray_session import ray_session

    pool_flags = options.actors, options.cpus_per_actor, options.gpus_per_actor
    few = job.task.num_rows - job.rows_written <= IN_PROCESS_ROWS
    if few and starts_local_ray(options.address) and pool_flags == (None, None, None):
        console.print(f"{job.checkpoint} of {options.run} in this process, without Ray")
        with termination_as_interrupt():
            updates = run_inference(job, model=model)
            return _show_progress(updates, job, console), time.monotonic()
    import ray.data  # noqa: F401  # sets up its loggers, before `ray_session` makes them quiet

    with ray_session(options.address, False, options.verbose, console) as local:
        if job.output.local:
            check_shared_storage(RunStorage.from_uri(job.output.location), "out")
        each = options.cpus_per_actor, options.gpus_per_actor
        pool = allocate_actors(options.actors, *each, local, len(job.missing))
        console.print(f"{job.checkpoint} of {options.run} on {pool}")
        return _show_progress(run_inference(job, pool), job, console), time.monotonic()


def _show_progress(
    updates: Iterable["InferenceProgress"], job: "InferenceJob", console: Console
) -> "InferenceProgress":
    """Show a bar in a terminal, else a line every LOG_INTERVAL seconds; returns the last update."""
    bar = Progress(
        BarColumn(),
        TextColumn("{task.description}", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    printed = time.monotonic()
    with bar:
        task = bar.add_task(
            "loading the networks", total=job.task.num_rows, completed=job.rows_written
        )
        for update in updates:
            written = job.rows_written + update.rows
            line = f"{written:,} of {job}  {update.rows / update.seconds:,.0f} images/s"
            bar.update(task, completed=written, description=line)
            if not console.is_terminal and time.monotonic() - printed > LOG_INTERVAL:
                printed = time.monotonic()
                console.print(line)
    return update
