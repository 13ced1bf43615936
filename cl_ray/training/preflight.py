"""All checks before Ray starts, shared by training, search and inference, and the folder's lock.

A mistake is reported within a second and leaves nothing behind. Resources of a cluster are checked
by `resources.plan_workers` and shared storage by `check_shared_storage`, once it is joined.
"""

import contextlib
import errno
import hashlib
import math
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import filelock
from rich.console import Console

from cl_ray.base_config import marked_fields
from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config, differences
from cl_ray.console import print_line
from cl_ray.data.dataset import Dataset
from cl_ray.data.partition import HARD_NEGATIVES_NEED_MEMORY, Partition
from cl_ray.environment import usable_cpus
from cl_ray.errors import UserError, pluralize
from cl_ray.storage import RunStorage, absolute_location
from cl_ray.training.ray_compat import in_ray_job
from cl_ray.training.ray_session import cluster_address
from cl_ray.training.resources import (
    InsufficientResourcesError,
    Shortage,
    alive_nodes,
    start_on_node,
)

WRITTEN_AFTER_FIRST_CHECKPOINT = ("generator.safetensors", "checkpoints/best.txt")
LEAST_STEPS = 300
"""Digits are seen after 100 steps of the preset `quick` and are sharp after 300; docs/training.md
has the figures. Other images take more."""
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of a file system without locks."""


def check_pairs(config: Config, dataset: Dataset) -> None:
    """Check that pairs can be formed from the data.

    Raises:
        UserError: There is no split `train`, the labels that the pairs need are missing or all of
            one class, there are too few images, or they are all alike.
    """
    dataset.row_groups("train")
    rows = dataset.info.splits["train"].rows
    least, most = config.worker_range
    if rows // most <= config.pairs.candidates:
        raise UserError(
            f"pairs.candidates {config.pairs.candidates} must be less than the number of images of "
            f"{config.data} per worker, {rows // most}: lower it or use more images."
        )
    shard = Partition(dataset, config, least)
    if not shard.resident and shard.window_rows <= config.pairs.candidates:
        raise UserError(
            f"pairs.candidates {config.pairs.candidates} needs more than the {shard.window_rows} "
            "images of a window, within which images that stream are paired: lower it, or raise "
            "shards.window (a window has at most 64 MB of pixels)."
        )
    labelled = dataset.info.labelled_rows("train")
    if config.pairs.mode == "labels" and not labelled:
        raise UserError(
            f"pairs.mode `labels` needs labels, and {config.data} has none: use `views`."
        )
    if config.pairs.mode == "labels" and (only := dataset.only_label("train")) is not None:
        raise UserError(
            f"pairs.mode `labels` needs two classes, and all images of {config.data} are of class "
            f"{only}: use `views`."
        )
    if config.pairs.negatives == "hard" and not shard.resident:
        raise UserError(HARD_NEGATIVES_NEED_MEMORY)
    if config.condition != "none":
        if not labelled:
            raise UserError(
                f"condition `{config.condition}` needs labels, and {config.data} has none: use "
                "`none`."
            )
        if labelled < rows and config.condition == "projection":
            raise UserError(
                "condition `projection` needs a label for each training image, and "
                f"{rows - labelled:,} of the {rows:,} of {config.data} have none: use `classifier` "
                "or `none`, or write the data without them with `cl-ray data --unlabelled drop`."
            )
        dataset.class_names()
    if config.labels.count:
        check_label_count(config, dataset)
    if dataset.distance_quantile("train", config.pairs.quantile) <= 0:
        raise UserError(
            f"The images of {config.data} are (nearly) all alike: their pairwise distance at "
            f"pairs.quantile {config.pairs.quantile} is 0; take other data or a higher quantile."
        )


def check_label_count(config: Config, dataset: Dataset) -> None:
    """Check that `labels.count` is of use, and that there are as many labels to draw.

    Raises:
        UserError: The training uses no labels or needs all of them, or there are fewer labels or
            not one for each class.
    """
    count, labelled = config.labels.count or 0, dataset.info.labelled_rows("train")
    if not config.supervision:
        raise UserError(
            f"labels.count {count:,} has no effect, as the training uses no labels: use condition "
            "`classifier` or pairs.mode `labels`, or leave it out."
        )
    if config.condition == "projection" and count < labelled:
        raise UserError(
            f"labels.count {count:,} leaves images without a label, and condition `projection` "
            "scores each image by its class: use `classifier`."
        )
    check_label_draw("labels.count", count, dataset)


def check_label_draw(field: str, count: int, dataset: Dataset) -> None:
    """Check that `count` labels can be drawn, one of each class or more, else a UserError."""
    labelled = dataset.info.labelled_rows("train")
    if count > labelled:
        raise UserError(
            f"{field} {count:,} is more than the {labelled:,} training images of "
            f"{dataset.location} that have a label: lower it, or leave it out to use all."
        )
    classes = sum(map(bool, dataset.class_counts("train")))
    if count < classes:
        raise UserError(
            f"{field} {count} is less than one for each of the {classes:,} classes of "
            f"{dataset.location}: take {classes} or more."
        )


def run_notes(config: Config, dataset: Dataset) -> list[str]:
    """Return sentences on the run's length and data, to be printed before it starts."""
    train = dataset.info.splits["train"]
    partition = Partition(dataset, config, config.worker_range[0])
    steps = config.epochs * partition.steps
    length = f"{pluralize(steps, 'step')} in {pluralize(config.epochs, 'epoch')}"
    notes = [few_steps_note(steps, config.epochs) or f"The run has {length}."]
    if config.labels.count:
        counts = [count for count in partition.count_labels() if count]
        spread = " to ".join(f"{count:,}" for count in sorted({min(counts), max(counts)}))
        notes.append(
            f"{config.labels.count:,} of the {train.rows:,} training images keep their label, "
            f"{spread} of each class (labels.seed {config.labels.seed})."
        )
    without = f"{partition.unlabelled_rows:,} of the {train.rows:,} training images have no label"
    if partition.unlabelled_rows and config.pairs.mode == "labels":
        notes.append(
            f"{without}: they pair as in pairs.mode `views`, and are no negatives of labelled ones."
        )
    if partition.unlabelled_rows and config.condition != "none":
        notes.append(f"{without}: G is given the classes that D predicts for them.")
    return notes


def few_steps_note(steps: int, epochs: int) -> str:
    """Return a sentence on a run of too few steps for G to learn; empty if there are enough."""
    if steps >= LEAST_STEPS:
        return ""
    enough = math.ceil(LEAST_STEPS * epochs / steps)
    return (
        f"The run has {pluralize(steps, 'step')} in {pluralize(epochs, 'epoch')}, and G learns "
        f"little in fewer than {LEAST_STEPS}: `--epochs {enough}` reaches that."
    )


def resolve_reference_path(config: Config) -> Config:
    """Return the config with an absolute path where `evaluation.reference` is a path that exists.

    It is kept with the run, which may be resumed or evaluated in another working directory.
    """
    name = config.evaluation.reference
    if name in ("auto", "none", "mnist", "stacked-mnist"):
        return config
    prefix = next((p for p in ("transformers:", "inception:") if name.startswith(p)), "")
    path = Path(name.removeprefix(prefix)).expanduser()
    if not os.path.exists(path):  # False for a name that is too long, too
        return config
    reference = prefix + absolute_location(str(path))
    evaluation = config.evaluation.model_copy(update={"reference": reference})
    return config.model_copy(update={"evaluation": evaluation})


def check_reference(config: Config, dataset: Dataset) -> None:
    """Check that the reference classifier of the evaluations, and the condition, fit the data.

    Raises:
        UserError: It is missing, or takes images of another shape; or the split that is measured
            on lacks the labels that the condition needs.
    """
    given = config.evaluation.reference not in ("auto", "none")
    if config.evaluation.every and (given or config.condition == "projection"):
        from cl_ray.evaluation.evaluate import Evaluator, check_decodable

        evaluator = Evaluator(dataset, config.evaluation)
        check_decodable(dataset, evaluator.split, config.condition)


def replace_auto_reference(config: Config, reference: str | None) -> Config:
    """Return the config with that `evaluation.reference` in place of `auto`."""
    if config.evaluation.reference != "auto":
        return config
    evaluation = config.evaluation.model_copy(update={"reference": reference or "none"})
    return config.model_copy(update={"evaluation": evaluation})


def check_checkpoint_metric(config: Config, dataset: Dataset) -> None:
    """Check that the run computes the metric that selects its best checkpoint, else a UserError."""
    kind, _, name = config.checkpoint.metric.partition("/")
    if kind != "evaluation":
        unlabelled = Partition(dataset, config).unlabelled_rows > 0
        available = config.loss_names(unlabelled)
        if config.checkpoint.metric not in ("auto", *available):
            raise UserError(
                f"checkpoint.metric {config.checkpoint.metric!r} is not among the metrics of an "
                f"epoch: take {', '.join(available)}, or one of an evaluation, such as "
                "'evaluation/frechet'."
            )
        return
    if not config.evaluation.every:
        raise UserError(
            f"checkpoint.metric {config.checkpoint.metric!r} is of an evaluation, and "
            "evaluation.every 0 turns evaluations off: raise it, or take a metric of the epoch, "
            "such as 'g/reconstruction'."
        )
    from cl_ray.evaluation.metrics import MetricContext, check_metric_available

    context = MetricContext.of(dataset, config.evaluation, config.condition)
    check_metric_available(name, context, "checkpoint.metric", prefix="evaluation/")


def starts_local_ray(address: str | None) -> bool:
    """Whether Ray will be started on this machine: no cluster is to be joined, and none runs."""
    ray = sys.modules.get("ray")
    return not cluster_address(address) and not (ray and ray.is_initialized())


def check_local_resources(config: Config) -> None:
    """Check that this machine has the device and what the least workers need, else a UserError."""
    least = config.worker_range[0]
    if config.device not in ("auto", "cpu"):
        from cl_ray.device import select_device  # torch

        select_device(config.device)
    check_local_capacity(config.cpus_per_worker, config.gpus_per_worker, "worker")
    cpus, available = config.cpus_per_worker or 1.0, usable_cpus()
    if least * cpus > available:
        fits = int(available / cpus)
        raise InsufficientResourcesError(
            Shortage(
                least, cpus, 0.0, "CPU", available, None, fits, place="this machine",
                batch_size=config.batch_size,
            )
        )  # fmt: skip


def check_local_capacity(cpus: float | None, gpus: float | None, unit: str) -> None:
    """Check that this machine has what one `worker`, `actor` or `trial` needs, else a UserError."""
    for kind, requested, count in (("cpus", cpus, usable_cpus), ("gpus", gpus, _local_gpus)):
        if requested and requested > (available := count()):
            hint = f"take at most {available}" if available else "leave it out"
            raise UserError(
                f"{kind}_per_{unit} {requested:g} is more than this machine has, {available}: "
                f"{hint}, or join a cluster with --address."
            )


def _local_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def check_outlives_job(location: str, flag: str) -> None:
    """Check that what a Ray job writes to a location is still there when the job has ended.

    A job runs in Ray's copy of its working directory, which is named after the code in it and lies
    in the folder of the Ray session.

    Raises:
        UserError: The location is relative, or in that copy.
    """
    if not in_ray_job() or "://" in location:
        return
    path, here = Path(location).expanduser(), Path.cwd()
    if path.is_absolute() and not ("runtime_resources" in here.parts and here in path.parents):
        return
    raise UserError(
        f"{flag} {location!r} would lie in Ray's copy of the job's working directory, which ends "
        f"with the cluster: give --{flag} s3://..., gs://... or an absolute path that every "
        "machine mounts."
    )


def check_shared_storage(folder: RunStorage, flag: str = "storage") -> None:
    """Check that all nodes of the joined cluster see a local folder, in which this one can write.

    Raises:
        UserError: A node does not see what is written here.
    """
    import ray

    nodes = alive_nodes()
    if folder.remote or len(nodes) < 2:
        return
    mark = Path(folder.uri) / f".seen-{uuid4().hex}"  # no earlier run has left this one

    def sees() -> bool:
        return mark.exists()

    mark.touch()
    try:
        seen = ray.get([start_on_node(node["NodeID"], sees) for node in nodes])
    finally:
        mark.unlink()
    blind = [n["NodeManagerHostname"] for n, sees in zip(nodes, seen, strict=True) if not sees]
    if blind:
        raise UserError(
            f"{flag} {folder.storage!r} is not shared: {', '.join(blind)} cannot see it; give "
            f"--{flag} s3://..., gs://... or a path that every machine mounts."
        )


def check_resumable(
    config: Config,
    dataset: Dataset,
    folder: RunStorage,
    checkpoints: CheckpointStore,
    console: Console,
) -> None:
    """Check that the run in a folder can be resumed with a config, or print that it starts again.

    Raises:
        UserError: The folder is damaged, of another format, or the run has another config or other
            data.
    """
    saved, newest = folder.read("config.yaml"), checkpoints.newest()
    _check_complete(folder, checkpoints, saved is not None, newest is not None)
    if saved is None:
        return
    file = f"{folder}/config.yaml"
    before = Config.from_run_yaml(saved.decode(errors="replace"), file)
    if newest:
        if changed := _fixed_differences(before, config):
            raise UserError(
                f"The run {folder} was started with other settings ({_describe(changed)}): leave "
                "those out to resume it, or use another --name."
            )
        metadata = checkpoints.metadata(newest.name)
        trained = Config.from_yaml(metadata["config"], f"{folder}, {newest.name}", base=before)
        if changed := _fixed_differences(trained, before):
            raise UserError(
                f"{file} is not what {newest.name} was trained with ({_describe(changed)}): put "
                "back the run's own, or take another --name."
            )
        dataset.check_same(metadata.get("data"))
        return
    changed = differences(before, config)
    changed = {k: pair for k, pair in changed.items() if k not in ("name", "storage")}
    but = f", but {_describe(changed)}" if changed else ""
    start = f"The run {folder} has no checkpoint yet and starts again"
    print_line(console, f"{start}, with the settings of its config.yaml{but}.")


def _check_complete(
    folder: RunStorage, checkpoints: CheckpointStore, has_config: bool, has_checkpoint: bool
) -> None:
    """Refuse a folder that lost its config or its checkpoints.

    The first checkpoint may be incomplete: the run was killed while it was written.
    """
    names = checkpoints.names()
    if not names:
        return
    hint = "put back what is missing, or take another --name"
    if not has_config:
        raise UserError(f"The run {folder} has checkpoints and no config.yaml: {hint}.")
    later = any(folder.read(file) for file in WRITTEN_AFTER_FIRST_CHECKPOINT)
    if has_checkpoint or (len(names) == 1 and not later):
        return
    raise UserError(
        f"The run {folder} is damaged: none of its checkpoints ({', '.join(names)}) has a complete "
        f"manifest.json: {hint}."
    )


def _fixed_differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the differences in fields that a resumed run must not change."""
    changeable = marked_fields(Config, "changeable_on_resume")
    return {k: pair for k, pair in differences(old, new).items() if k not in changeable}


def _describe(changed: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{field} was {a!r}, now {b!r}" for field, (a, b) in changed.items())


@contextlib.contextmanager
def exclusive_lock(folder: RunStorage, kind: str) -> Iterator[None]:
    """Lock the folder of a `run` or a `search` for this process; the lock ends with the process.

    An object store has no locks. For a folder there the lock file lies on this machine, so that
    processes of one machine exclude each other, as the jobs of a cluster do, whose drivers all run
    on its head.

    Raises:
        UserError: Another process holds the lock.
    """
    file = Path(folder.uri) / ".lock"
    if folder.remote:
        digest = hashlib.sha256(folder.uri.encode()).hexdigest()[:16]
        file = Path(tempfile.gettempdir()) / f"cl_ray-{os.getuid()}-{digest}.lock"
    # Without the fallback, whose marker would survive a killed process on another machine.
    lock = filelock.FileLock(file, mode=0o600, blocking=False, fallback_to_soft=False)
    try:
        lock.acquire()
        file.write_text(f"process {os.getpid()} on {socket.gethostname()}")
    except filelock.Timeout as error:
        raise UserError(
            f"The {kind} {folder} is in use by another process ({file.read_text() or 'unknown'}): "
            "wait for it or stop it, or use another --name."
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
    try:
        yield
    finally:
        lock.release()
