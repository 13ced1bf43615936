"""Run an inference task part by part: in this process, or on a pool of model actors.

On a pool, Ray Data's `map_batches` hands part numbers to actors and restarts them. Each actor
computes and writes a whole part, so only part numbers and metrics pass through Ray's object store
and the driver, and memory grows neither with the result nor with the pool.

The parts are written by `OutputFolder` instead of Ray Data's writers. Those cannot keep what is
promised here: they write in place and into files with random names, so a killed run would leave
partial and, after a restart, duplicate files; they store images in a Parquet type that only Ray
reads; and a writer is a task of its own, to which every image would travel.
"""

import contextlib
import math
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cl_ray.environment import peak_memory
from cl_ray.errors import UserError, first_error_line
from cl_ray.inference.output import OutputFolder, class_folder_names
from cl_ray.inference.tasks import InferenceTask
from cl_ray.storage import absolute_location
from cl_ray.training.resources import (
    describe_resources,
    find_autoscaler,
    live_nodes,
    max_capacity,
    workers_per_node,
)

if TYPE_CHECKING:
    from cl_ray.model import TrainedModel

MAX_BLOCKS = 4096
"""Limit of Ray Data's blocks, so that the driver's memory does not grow with the request."""
MAX_RETRIES = 3
"""How often an actor that died is restarted, and a part retried after its actor died."""

PartMetrics = dict[str, NDArray[Any]]
"""Of one or more parts that were computed: an array with a value for each, by name."""


@dataclass(frozen=True)
class InferenceJob:
    """A checked task with its model and its output; small and picklable.

    Args:
        checkpoint: Name of one of its checkpoints.
        request: What the output's manifest records.
        missing: Numbers of the parts that are not written yet.
        note: What a user should know beforehand; empty for nothing.
    """

    run: str
    checkpoint: str
    task: InferenceTask
    output: OutputFolder
    request: dict[str, Any]
    part_size: int
    missing: list[int]
    note: str

    def __str__(self) -> str:
        return f"{self.task.num_rows:,} {self.task.noun}"

    @property
    def rows_written(self) -> int:
        """Rows in the parts that are not missing."""
        return self.task.num_rows - sum(b - a for a, b in map(self.row_range, self.missing))

    def row_range(self, part: int) -> tuple[int, int]:
        """Return the first row of a part and the one after its last."""
        start = part * self.part_size
        return start, min(start + self.part_size, self.task.num_rows)

    def refresh(self) -> "InferenceJob":
        """Return the job with the parts that are missing now."""
        num_parts = -(-self.task.num_rows // self.part_size)
        return replace(self, missing=self.output.missing_parts(num_parts))


@dataclass(frozen=True)
class ActorPool:
    """How many model actors there are, and what each of them takes.

    Args:
        cpus: CPUs of each; rounded down, its threads.
        gpus: GPUs of each; with none it computes on its CPUs.
        can_grow: Whether an autoscaler may add capacity for more, up to a limit that is unknown.
    """

    num_actors: int
    cpus: float
    gpus: float
    can_grow: bool = False

    def __str__(self) -> str:
        each = describe_resources(self.cpus, self.gpus)
        hint = "; --actors asks the autoscaler for more" if self.can_grow else ""
        return f"{self.num_actors} actor{'s' if self.num_actors > 1 else ''}, {each} each{hint}"


@dataclass(frozen=True)
class InferenceProgress:
    """What a pool has computed so far.

    Args:
        rows: Rows written by this pool.
        seconds: Since the first actor began its first part.
        peak_memory: Largest memory of an actor, in bytes.
    """

    rows: int
    seconds: float
    peak_memory: int


def prepare_inference(
    run: str,
    task: InferenceTask,
    out: str,
    *,
    checkpoint: str = "last",
    overwrite: bool = False,
    model: "TrainedModel | None" = None,
) -> InferenceJob:
    """Check that a task can be done and claim its output folder. Needs no Ray.

    Args:
        run: Path or URI of the run folder.
        task: What to compute.
        out: A folder or URI. A name that ends in `.parquet` becomes a folder of Parquet files, any
            other a folder of PNG files.
        checkpoint: Which of the run's checkpoints; see `cl_ray.load`.
        overwrite: Replace the results of another request in `out`.
        model: That checkpoint, if it is loaded on the CPU already.

    Raises:
        UserError: The run cannot be loaded, the data has another image shape than the run, or `out`
            is taken or cannot be written.
    """
    output = OutputFolder.resolve(out)
    from cl_ray.model import load  # imports torch

    model = model or load(absolute_location(run), checkpoint, "cpu")
    if task.dataset is not None:
        model.check_shape(task.dataset)
    task.check(model)
    part_size = task.part_size(model)
    request = {
        "run": absolute_location(run),
        "checkpoint": model.checkpoint,
        "weights digest": weights_digest(model),
        **task.describe(),
        "rows": task.num_rows,
        "rows in a part": part_size,
    }
    complete = output.claim(request, overwrite)
    job = InferenceJob(
        run=absolute_location(run), checkpoint=model.checkpoint, task=task, output=output,
        request=request, part_size=part_size, missing=[], note=task.note(model),
    )  # fmt: skip
    if complete and not output.parquet:  # its parts have no markers; Parquet files mark themselves
        return job
    job = job.refresh()
    if not job.missing and not complete:  # it was killed after its last part
        output.finish(request)
    return job


def weights_digest(model: "TrainedModel") -> str:
    """Hash all weights and the fitted prior: a path may hold another run later."""
    import hashlib

    digest = hashlib.sha256()
    for network in (model.generator, model.discriminator):
        for weight in network.state_dict().values():
            digest.update(weight.contiguous().numpy().tobytes())
    for tensor in model.prior or ():
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def allocate_actors(
    num_actors: int | None, cpus: float | None, gpus: float | None, local: bool, num_parts: int
) -> ActorPool:
    """Choose the number of actors and what each gets of Ray's cluster. Ray runs already.

    Args:
        num_actors: How many are wanted; None is as many as fit, including on nodes that an
            autoscaler may add.
        cpus: CPUs of each; None is 1, or with this machine's GPUs an equal part of its CPUs.
        gpus: GPUs of each, a fraction allowed; None is 1 where this machine has one, else 0.
        local: Whether the cluster is this machine alone.
        num_parts: Parts to compute, the most actors that have work.

    Raises:
        UserError: Not even one fits.
    """
    nodes = live_nodes()
    largest = {kind: max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    if gpus is None:
        gpus = min(1.0, largest["GPU"]) if local else 0.0
    if cpus is None:
        divide = local and gpus and largest["GPU"]
        cpus = max(1.0, largest["CPU"] // largest["GPU"]) if divide else 1.0
    actors_per_node = partial(workers_per_node, cpus=cpus, gpus=gpus)
    fit = sum(map(actors_per_node, nodes))
    wanted = min(num_actors or num_parts, num_parts)
    if wanted <= fit:
        return ActorPool(wanted, cpus, gpus)
    capacity = max_capacity(actors_per_node, nodes, None if local else find_autoscaler())
    if not capacity:
        raise UserError(
            f"An actor of {describe_resources(cpus, gpus)} fits no node of the cluster; the "
            f"largest has {describe_resources(largest['CPU'], largest['GPU'])}: give smaller "
            "--cpus-per-actor and --gpus-per-actor."
        )
    can_grow = num_actors is None and math.isinf(capacity)
    if can_grow:
        wanted = max(1, fit)
    # More than fit now may be asked for: the autoscaler sees the actors that are pending.
    return ActorPool(int(min(wanted, capacity)), cpus, gpus, can_grow and wanted < num_parts)


class Predictor:
    """Holds the networks, and computes and writes one part after another. An actor of the pool.

    Args:
        device: Where, as `cl_ray.load` takes it.
        threads: Threads of torch; None leaves them as they are.
        model: The job's, if it is loaded already.
    """

    def __init__(
        self,
        job: InferenceJob,
        device: str,
        threads: int | None = None,
        model: "TrainedModel | None" = None,
    ):
        import torch

        from cl_ray.device import keep_freed_memory, select_device
        from cl_ray.model import load

        keep_freed_memory()
        if threads:
            torch.set_num_threads(threads)
        self.job = job
        self.load_error = ""
        try:
            loaded = model.to(select_device(device)) if model else None
            self.model = loaded or load(job.run, job.checkpoint, device)
            dataset = job.task.dataset
            classes = dataset.info.classes if dataset else list(self.model.classes)
            self.class_folders = class_folder_names(classes or None)
        except UserError as error:  # possible on the driver but not on this node
            self.load_error = str(error)

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> PartMetrics:
        """Compute a batch of one part number and return one row of metrics.

        An error is returned as a sentence: Ray Data would wrap an exception in its traceback.
        """
        began = time.perf_counter()
        part = int(batch["part"][0])
        start, stop = self.job.row_range(part)
        error_line = self.load_error
        try:
            if not error_line:
                table = self.job.task.compute(self.model, start, stop)
                for name, content in self.job.output.part_files(part, table, self.class_folders):
                    self.job.output.write(name, content)
        except UserError as error:
            error_line = str(error)
        except OSError as error:
            error_line = f"out {self.job.output} cannot be written: {first_error_line(error)}"
        metrics = {
            "rows": stop - start,
            "error": error_line,
            "seconds": time.perf_counter() - began,
            "peak_memory": peak_memory(),
        }
        return {name: np.array([value]) for name, value in metrics.items()}


def run_inference(
    job: InferenceJob, pool: ActorPool | None = None, model: "TrainedModel | None" = None
) -> Iterator[InferenceProgress]:
    """Compute all missing parts and yield the progress after each.

    Args:
        job: What to compute.
        pool: Where, by Ray, which runs already; None computes in this process.
        model: The job's, if it is loaded in this process already; a pool's actors load it.

    Raises:
        UserError: A part cannot be read, computed or written, or an actor keeps dying. Parts that
            are written stay.
    """
    rows = peak = 0
    began = math.inf
    failed = ""
    # Closed, or the actors of a pool keep their CPUs after an error.
    with contextlib.closing(
        _pool_results(job, pool) if pool else _local_results(job, model)
    ) as blocks:
        for block in blocks:
            began = min(began, time.perf_counter() - block["seconds"].max())
            failed = next((str(error) for error in block["error"] if error), "")
            if failed:
                break
            rows += int(block["rows"].sum())
            peak = max(peak, int(block["peak_memory"].max()))
            yield InferenceProgress(rows, time.perf_counter() - began, peak)
    if failed:  # told when the other actors have ended, which may have written parts meanwhile
        raise UserError(_failure_message(job, failed))
    missing = job.refresh().missing
    if missing:
        raise UserError(
            f"{len(missing)} parts are not in {job.output} although they were written: is it the "
            "same folder on all nodes?"
        )
    job.output.finish(job.request)


def _local_results(job: InferenceJob, model: "TrainedModel | None") -> Generator[PartMetrics]:
    """Compute the missing parts in this process."""
    predictor = Predictor(job, "auto", model=model)
    for part in job.missing:
        yield predictor({"part": np.array([part])})


def _pool_results(job: InferenceJob, pool: ActorPool) -> Generator[PartMetrics]:
    """Have a pool of actors compute the missing parts."""
    import ray.data
    from ray.exceptions import RayActorError

    from cl_ray.training.ray_compat import actor_restart_options, failure_reason

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    parts = ray.data.from_items(
        [{"part": part} for part in job.missing],
        override_num_blocks=min(len(job.missing), MAX_BLOCKS),
    )
    with actor_restart_options(MAX_RETRIES) as restart_options:
        results = parts.map_batches(
            Predictor,
            fn_constructor_args=(job, "cuda" if pool.gpus else "cpu", max(1, int(pool.cpus))),
            batch_size=1,
            # One part at work and one queued: with a longer queue one actor would end alone.
            compute=ray.data.ActorPoolStrategy(
                size=pool.num_actors, max_tasks_in_flight_per_actor=2
            ),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            **restart_options,
        )
    try:
        yield from iter(
            results.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0)
        )
    except RayActorError as error:
        if error.actor_init_failed:
            raise  # an exception in the constructor is a bug, not a crash of the process
        reason = f"An actor died after {MAX_RETRIES} restarts: {failure_reason(error)}"
        raise UserError(_failure_message(job, reason)) from error


def _failure_message(job: InferenceJob, error: str) -> str:
    """Say what failed, what is written, and how to resume."""
    written = job.refresh().rows_written
    done = f"{written:,} of {job} are written"
    return f"{error.rstrip('.')}; {done}, and the same command resumes."
