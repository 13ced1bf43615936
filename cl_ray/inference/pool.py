"""A pool of model actors on Ray Data, which hands them the numbers of the parts to make.

Parts are made and written by the actors themselves, so nothing but numbers and metrics goes
through Ray's object store and the driver: memory grows neither with the images nor with the
actors. Whatever is killed, at any moment, a part is there whole or is made again.
"""

import contextlib
import errno
import math
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from rich.filesize import decimal

from cl_ray.data.dataset import absolute_location, first_error_line
from cl_ray.environment import peak_memory
from cl_ray.errors import UserError, redact_credentials
from cl_ray.inference.output import Output, bytes_on_disk, folder_names
from cl_ray.inference.work import Work, note, part_size

if TYPE_CHECKING:
    from cl_ray.model import TrainedModel

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BLOCKS = 4096
"""Most blocks that Ray Data is given: what its driver holds for them does not grow either."""
RETRIES = 3
"""Times that an actor that died is started again, and that a part is tried again under which."""


@dataclass(frozen=True)
class Job:
    """What is to be made, seen to be possible; small and picklable.

    Args:
        run: The run folder's path or URI.
        checkpoint: The name of one of its checkpoints.
        work: What is made of it.
        output: Where it goes.
        record: What `_made.json` says of it.
        size: Results in a part.
        missing: The parts that are not there yet.
        note: What a user should know of it.
    """

    run: str
    checkpoint: str
    work: Work
    output: Output
    record: dict[str, Any]
    size: int
    missing: list[int]
    note: str

    @property
    def parts(self) -> int:
        """How many there are, missing or not."""
        return -(-self.work.total // self.size)

    @property
    def done(self) -> int:
        """Results that are there."""
        return self.work.total - sum(stop - start for start, stop in map(self.span, self.missing))

    def span(self, part: int) -> tuple[int, int]:
        """The results of a part."""
        start = part * self.size
        return start, min(start + self.size, self.work.total)


@dataclass(frozen=True)
class Pool:
    """The models at work.

    Args:
        actors: How many there are.
        cpus: CPUs of each, and threads, rounded down.
        gpus: GPUs of each; with none it computes on its CPUs.
        more: Whether an autoscaler may add room for more, and does not say for how many.
    """

    actors: int
    cpus: float
    gpus: float
    more: bool = False


@dataclass(frozen=True)
class Made:
    """What a pool has made so far.

    Args:
        images: Results made.
        seconds: Since the first actor began with its first part.
        peak: Most bytes that an actor held.
    """

    images: int
    seconds: float
    peak: int


def prepare(
    run: str, work: Work, out: str, *, checkpoint: str = "last", overwrite: bool = False
) -> Job:
    """See that a work can be done, and claim the place for it. Needs no Ray.

    Args:
        run: The run folder's path or URI.
        work: What is made.
        out: A folder or URI; a name that ends in `.parquet` becomes a folder of Parquet files,
            any other one of PNG files.
        checkpoint: Which of the run's; see `cl_ray.load`.
        overwrite: Replace what another request made at `out`.

    Raises:
        UserError: The run cannot be loaded, the data is of another shape than its images, or
            `out` is taken or cannot be written.
    """
    output = Output.at(out)
    from cl_ray.model import load  # torch

    loaded = load(absolute_location(run), checkpoint, "cpu")
    if work.dataset is not None and work.dataset.info.shape != loaded.shape:
        theirs, ours = ("x".join(map(str, s)) for s in (work.dataset.info.shape, loaded.shape))
        raise UserError(
            f"{work.dataset.location} has images of {theirs} and {run} makes {ours}: take the "
            "data that it was trained on, or the like."
        )
    size = part_size(work, loaded)
    record = {
        "run": redact_credentials(absolute_location(run)),
        "checkpoint": loaded.checkpoint,
        "weights digest": digest(loaded),
        **work.record(),
        "images": work.total,
        "images in a part": size,
    }
    complete = output.claim(record, overwrite)
    missing = [] if complete else output.missing(-(-work.total // size))
    told = note(work, loaded)
    return Job(absolute_location(run), loaded.checkpoint, work, output, record, size, missing, told)


def digest(run: "TrainedModel") -> str:
    """Of all weights and of the prior: another run may come to lie where one was."""
    import hashlib

    total = hashlib.sha256()
    for network in (run.generator, run.discriminator):
        for weight in network.state_dict().values():
            total.update(weight.contiguous().numpy().tobytes())
    for part in run.prior or ():
        total.update(part.contiguous().numpy().tobytes())
    return total.hexdigest()


def share_out(
    actors: int | None, cpus: float | None, gpus: float | None, local: bool, parts: int
) -> Pool:
    """How many actors there are, and what each of them gets of Ray's cluster.

    Args:
        actors: As many as were asked for; None is as many as fit, machines that an
            autoscaler may add included.
        cpus: CPUs of each; None is 1, or with GPUs of this machine an equal part of its CPUs.
        gpus: GPUs of each, a fraction allowed; None is 1 where this machine has one, else 0.
        local: Whether the cluster is this machine's own.
        parts: How many there are to make; more actors are of no use.

    Raises:
        UserError: None fits.
    """
    import ray

    from cl_ray.training.autoscaler import find_autoscaler
    from cl_ray.training.resources import max_capacity, workers_per_node

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    largest = {kind: max(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU")}
    if gpus is None:
        gpus = min(1.0, largest["GPU"]) if local else 0.0
    if cpus is None:
        shared = local and gpus and largest["GPU"]
        cpus = max(1.0, largest["CPU"] // largest["GPU"]) if shared else 1.0
    holds = partial(workers_per_node, cpus=cpus, gpus=gpus)
    fit = sum(map(holds, nodes))
    wanted = min(actors or parts, parts)
    if wanted <= fit:
        return Pool(wanted, cpus, gpus)
    most = max_capacity(holds, nodes, None if local else find_autoscaler())
    if not most:
        each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        raise UserError(
            f"An actor of {each} fits no machine of the cluster, of which the largest has "
            f"{largest['CPU']:g} CPU and {largest['GPU']:g} GPU: take smaller "
            "--cpus-per-actor and --gpus-per-actor."
        )
    more = actors is None and math.isinf(most)
    if more:
        wanted = max(1, fit)
    # Ray's autoscaler sees those that wait for a place.
    return Pool(int(min(wanted, most)), cpus, gpus, more and wanted < parts)


class Maker:
    """An actor of the pool: holds the networks, makes and writes one part after another."""

    def __init__(self, job: Job, pool: Pool):
        import torch

        from cl_ray.device import keep_freed_memory
        from cl_ray.model import load

        keep_freed_memory()
        torch.set_num_threads(max(1, int(pool.cpus)))
        self.job = job
        self.complaint: str | None = None
        try:
            self.run = load(job.run, job.checkpoint, "cuda" if pool.gpus else "cpu")
            dataset = job.work.dataset
            classes = dataset.info.classes if dataset else list(self.run.classes)
            self.names = folder_names(classes or None)
        except UserError as error:  # the driver could, this machine cannot
            self.complaint = str(error)

    def __call__(self, batch: dict[str, NDArray[np.int64]]) -> dict[str, NDArray[Any]]:
        """Parts by number in, a row of metrics each out."""
        rows = [self.one(int(part)) for part in batch["part"]]
        return {name: np.array([row[name] for row in rows]) for name in rows[0]}

    def one(self, part: int) -> dict[str, Any]:
        """Make a part and put it in place.

        A complaint is handed on in words: Ray Data would wrap an exception in a traceback.
        """
        begun = time.perf_counter()
        size, full, complaint = 0, False, self.complaint
        start, stop = self.job.span(part)
        try:
            if complaint is None:
                made = self.job.work.make(self.run, start, stop)
                files = self.job.output.files(part, made, self.names)
                size = sum(bytes_on_disk(content) for _, content in files)
                for name, content in files:
                    self.job.output.put(name, content)
        except UserError as error:
            complaint = str(error)
        except OSError as error:
            full = error.errno in FULL
            complaint = f"out {self.job.output} cannot be written: {first_error_line(error)}"
        return {
            "images": stop - start,
            "bytes": size,
            "full": full,
            "complaint": complaint or "",
            "seconds": time.perf_counter() - begun,
            "peak": peak_memory(),
        }


def produce(job: Job, pool: Pool) -> Iterator[Made]:
    """Make all parts that are missing, and yield after each how far it is. Ray runs already.

    Raises:
        UserError: A part cannot be read, made or written, or an actor dies again and again. The
            parts that are there stay.
    """
    import ray.data
    from ray.exceptions import RayActorError
    from ray.util.annotations import RayDeprecationWarning

    from cl_ray.training.failures import failure_reason

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    blocks = min(len(job.missing), BLOCKS)
    parts = ray.data.from_items([{"part": p} for p in job.missing], override_num_blocks=blocks)
    with warnings.catch_warnings():
        # Ray 2.60 has no other way to say how often either is tried, and tries for ever unsaid.
        warnings.simplefilter("ignore", RayDeprecationWarning)
        made = parts.map_batches(
            Maker,
            fn_constructor_args=(job, pool),
            batch_size=1,
            # One at work and one waiting: a longer queue would end with one actor alone at work.
            compute=ray.data.ActorPoolStrategy(size=pool.actors, max_tasks_in_flight_per_actor=2),
            num_cpus=pool.cpus,
            num_gpus=pool.gpus,
            max_restarts=RETRIES,  # also while it loads the run
            max_task_retries=RETRIES,
        )
    images = peak = 0
    begun = math.inf
    blocks_made = iter(made.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=0))
    try:
        with contextlib.closing(
            blocks_made
        ):  # or, after an error, its actors would keep their CPUs
            for block in blocks_made:
                for values in zip(*block.values(), strict=True):
                    row = dict(zip(block, values, strict=True))
                    begun = min(begun, time.perf_counter() - row["seconds"])
                    if row["complaint"]:
                        raise UserError(_explain(job, row))
                    images += int(row["images"])
                    peak = max(peak, int(row["peak"]))
                yield Made(images, time.perf_counter() - begun, peak)
    except RayActorError as error:
        if error.actor_init_failed:
            raise  # not its process died: something was raised there that should not be
        complaint = f"An actor was started again {RETRIES} times and died: {failure_reason(error)}"
        raise UserError(_explain(job, {"complaint": complaint, "full": False})) from error
    missing = job.output.missing(job.parts)
    if missing:
        raise UserError(
            f"{len(missing)} parts are not in {job.output} although they were written: do all "
            "machines see the same folder?"
        )
    job.output.finish(job.record)


def _explain(job: Job, row: dict[str, Any]) -> str:
    """Why it ended, what is there, and what would help."""
    job = replace(job, missing=job.output.missing(job.parts))
    there = job.done
    state = f"{there:,} of {job.work.total:,} images are there"
    if not row["full"]:
        return f"{str(row['complaint']).rstrip('.')}; {state}, and the same command goes on."
    need = int(row["bytes"]) / int(row["images"]) * (job.work.total - there)
    return (
        f"{row['complaint']}; {state}, and the rest takes about {decimal(int(need))}: make room "
        "for it, and the same command goes on."
    )
