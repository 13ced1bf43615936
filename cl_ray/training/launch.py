"""`train`: what the command and the Python call do, from a config to a run folder."""

import contextlib
import json
import shlex
import signal
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.text import Text

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.partition import HARD_NEGATIVES_NEED_MEMORY, Partition
from cl_ray.environment import package_version, peak_memory
from cl_ray.errors import UserError, redact_credentials
from cl_ray.losses.names import loss_names
from cl_ray.storage import RunStorage
from cl_ray.training.cluster import check_shared_storage, ray_session
from cl_ray.training.lock import exclusive_lock
from cl_ray.training.preflight import check_local_resources, starts_local_ray
from cl_ray.training.progress import TrainingProgress, format_duration, pluralize
from cl_ray.training.resume import check_resumable
from cl_ray.training.signals import handle_signal


@dataclass(frozen=True)
class LaunchOptions:
    """How a run is started; none of it changes what is computed.

    Args:
        address: A Ray cluster's address; None starts Ray on this machine, or joins the cluster
            that RAY_ADDRESS names, as a submitted job's environment does.
        dashboard: Start the Ray dashboard with a local Ray, and print its address.
        verbose: Show Ray's own messages and the workers' output.
        max_failures: Times that dead workers are started again.
        from_checkpoint: Go back to this checkpoint of an existing run.
    """

    address: str | None = None
    dashboard: bool = False
    verbose: bool = False
    max_failures: int = 3
    from_checkpoint: str | None = None


@dataclass(frozen=True)
class TrainResult:
    """What came out.

    Args:
        folder: The run folder's path or URI.
        summary: What summary.json holds.
    """

    folder: str
    summary: dict[str, Any]


def train(
    config: Config | None = None,
    launch: LaunchOptions | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train, or go on training, the run that `config` names.

    Args:
        config: The config tree; the preset `quick` if None.
        launch: How to start.
        console: Where progress is printed; standard output if None.

    Returns:
        The run folder and its summary.

    Raises:
        UserError: One sentence on what is wrong and the way out: before anything is started for
            a mistake in config, data, storage or capacity, or a run of that name that another
            process trains; later for a loss that is no number.
        KeyboardInterrupt: Stopped by Ctrl-C; the same call goes on from the last checkpoint.
    """
    config, launch = config or Config(), launch or LaunchOptions()
    console = console or Console()
    begun = time.monotonic()
    config = config.model_copy(update={"name": config.name or default_run_name(config)})
    folder = RunStorage.at(config.storage, str(config.name))
    dataset = Dataset.open(config.data)
    places = {"storage": folder.storage, "data": dataset.location}
    config = config.model_copy(update={k: redact_credentials(v) for k, v in places.items()})
    check_pairs(config, dataset)
    check_reference(config, dataset)
    check_checkpoint_metric(config, dataset)
    if starts_local_ray(launch.address):
        check_local_resources(config)
    folder.create()
    with exclusive_lock(folder, "run"):
        return _train(config, folder, dataset, launch, console, begun)


def _train(
    config: Config,
    folder: RunStorage,
    dataset: Dataset,
    launch: LaunchOptions,
    console: Console,
    begun: float,
) -> TrainResult:
    """Train in a folder that nobody else writes."""
    checkpoints = CheckpointStore(*folder.open(), keep=config.checkpoint.keep)
    check_resumable(config, folder, checkpoints, console)
    if launch.from_checkpoint:
        checkpoints.rollback_to(launch.from_checkpoint)
    newest = checkpoints.newest()
    if newest:
        checkpoints.check(newest.name)
        summary = json.loads(folder.read("summary.json") or b"{}")
        if newest.epoch >= config.epochs and summary.get("epochs", 0) >= newest.epoch:
            return _finished(folder, summary, console)
    with ray_session(launch.address, launch.dashboard, launch.verbose, console) as local:
        from cl_ray.training.resources import plan_workers, wait_for_resources

        capacity = plan_workers(config, local)
        if not folder.remote:
            check_shared_storage(folder)
        folder.write("config.yaml", config.to_yaml().encode())
        wait_for_resources(
            capacity, config.worker_range[0], lambda line: console.print(line, soft_wrap=True)
        )
        outcome = _fit(config, folder, dataset, launch, capacity, console)
    summary = _summary(outcome, folder, config, begun)
    if outcome["status"] != "finished":
        kept = checkpoints.newest()
        last = f"the last checkpoint is {kept.name}" if kept else "there is no checkpoint yet"
        raise UserError(f"{outcome['reason']} ({folder}: {last}.)")
    _show(summary, folder, console)
    return TrainResult(folder.uri, summary)


def default_run_name(config: Config) -> str:
    """A name that no earlier run has: the preset and the time."""
    return f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S}"


def check_pairs(config: Config, dataset: Dataset) -> None:
    """See that the data can give pairs at all, without reading an image.

    Raises:
        UserError: No split `train`, no labels or one class where the pairs need them, too few
            images, or all of them alike.
    """
    dataset.row_groups("train")
    rows = dataset.info.splits["train"].rows
    most = config.worker_range[1]
    if rows // most <= config.pairs.candidates:
        raise UserError(
            f"pairs.candidates {config.pairs.candidates} needs more than the {rows // most} images "
            f"that each of {most} workers has of {config.data}: lower it or take more images."
        )
    if config.pairs.mode == "labels" and not dataset.info.labelled:
        raise UserError(
            f"pairs.mode `labels` needs labels, and {config.data} has none: use `views`."
        )
    if config.pairs.mode == "labels" and (only := dataset.only_label("train")) is not None:
        raise UserError(
            f"pairs.mode `labels` needs two classes, and all images of {config.data} are of class "
            f"{only}: use `views`."
        )
    if config.pairs.negatives == "hard":
        fewest = Partition(dataset, config, config.worker_range[0])
        if not fewest.resident:
            raise UserError(HARD_NEGATIVES_NEED_MEMORY)
    if config.condition != "none":
        if not dataset.info.labelled:
            raise UserError(
                f"condition `{config.condition}` needs labels, and {config.data} has none: use "
                "`none`."
            )
        dataset.class_names()
    if dataset.distance_quantile("train", config.pairs.quantile) <= 0:
        raise UserError(
            f"The images of {config.data} are (nearly) all alike: their pairwise distance at "
            f"pairs.quantile {config.pairs.quantile} is 0; take other data or a higher quantile."
        )


def check_reference(config: Config, dataset: Dataset) -> None:
    """See that the reference that evaluations go by is there; the packaged one is.

    Raises:
        UserError: It is not, or takes images of another shape.
    """
    if config.evaluation.every and config.evaluation.reference not in ("auto", "none"):
        from cl_ray.evaluation.evaluate import Evaluator

        Evaluator(dataset, config.evaluation)


def check_checkpoint_metric(config: Config, dataset: Dataset) -> None:
    """See that the figure that is to mark the best checkpoint is there, or is measured.

    Raises:
        UserError: It is not.
    """
    kind, _, name = config.checkpoint.metric.partition("/")
    if kind != "evaluation":
        there = loss_names(config)
        if config.checkpoint.metric not in ("auto", *there):
            raise UserError(
                f"checkpoint.metric {config.checkpoint.metric!r} is not among the metrics of an "
                f"epoch: take {', '.join(there)}, or one of an evaluation, such as "
                "'evaluation/frechet'."
            )
        return
    if not config.evaluation.every:
        raise UserError(
            f"checkpoint.metric {config.checkpoint.metric!r} is of an evaluation, and "
            "evaluation.every 0 is none: raise it, or take a figure of the epoch's, such as "
            "'g/reconstruction'."
        )
    from cl_ray.evaluation.available_metrics import check_metric_available

    check_metric_available(name, config, dataset, "checkpoint.metric", prefix="evaluation/")


def _finished(folder: RunStorage, summary: dict[str, Any], console: Console) -> TrainResult:
    console.print(
        f"The run {folder} is finished ({pluralize(summary['epochs'], 'epoch')}); give more "
        "--epochs to go on."
    )
    return TrainResult(folder.uri, summary)


def _fit(
    config: Config,
    folder: RunStorage,
    dataset: Dataset,
    launch: LaunchOptions,
    capacity: Any,
    console: Console,
) -> dict[str, Any]:
    """Run the workers to their end; the progress is shown by a thread beside."""
    import ray

    from cl_ray.training.failures import failure_reason
    from cl_ray.training.torch_trainer import build_torch_trainer, start_progress_actor

    board = start_progress_actor(folder)
    trainer = build_torch_trainer(
        config, folder, dataset, capacity, board, launch.max_failures, verbose=launch.verbose
    )
    over = threading.Event()
    with TrainingProgress(console, config.epochs) as progress:
        watcher = threading.Thread(target=_watch, args=(board, progress, config, over), daemon=True)
        watcher.start()
        try:
            # Ray Train answers Ctrl-C in its own way and would, in a notebook, for ever after.
            with handle_signal(signal.SIGINT):
                result = trainer.fit()
        except SystemExit as error:  # Ray Train's answer to Ctrl-C
            raise KeyboardInterrupt from error
        except ray.train.TrainingFailedError as error:
            reason = None
            with contextlib.suppress(ray.exceptions.RayActorError):  # the board may be lost too
                reason = ray.get(board.fatal.remote())
            if reason is None:
                raise UserError(
                    f"The workers died more than {launch.max_failures} times: "
                    f"{' '.join(str(error).split())[-500:]}"
                ) from error
            return {"status": "stopped", "reason": reason}
        except ray.exceptions.RayError as error:
            return {
                "status": "stopped",
                "reason": f"Ray Train's controller is lost: {failure_reason(error)}; the same command "
                f"with --name {folder.name} goes on.",
            }
        finally:
            over.set()
            watcher.join(timeout=5)
    outcome = result.return_value
    if outcome is None:
        raise KeyboardInterrupt
    return dict(outcome)


def _watch(board: Any, progress: TrainingProgress, config: Config, over: threading.Event) -> None:
    """Show what the board says until the run is over, and once more."""
    import ray

    seen, last = 0, False
    while not last:
        last = over.wait(0.25)
        try:
            state, notes = ray.get(board.look.remote(seen), timeout=5)
        except Exception:  # the run goes on without its picture, as while Ray is going down
            continue
        for note in notes:
            progress.note(note)
        seen += len(notes)
        progress.show({**state, "batch_size": config.batch_size} if state else {})


def _summary(
    outcome: dict[str, Any], folder: RunStorage, config: Config, begun: float
) -> dict[str, Any]:
    packages = ("cl-ray", "ray", "torch", "torchvision", "pyarrow")
    summary = {
        **outcome,
        "name": folder.name,
        "preset": config.preset,
        "pairs": config.pairs.mode,
        "supervision": config.supervision,
        "seconds": round(time.monotonic() - begun, 1),
        "driver_peak_bytes": peak_memory(),
        "versions": {package: package_version(package) for package in packages},
    }
    folder.write("summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _show(summary: dict[str, Any], folder: RunStorage, console: Console) -> None:
    """The last lines: how it went, where everything lies, how to look at it."""
    metrics, where = summary["metrics"], shlex.quote(redact_credentials(folder.uri))
    shown = ", ".join(f"{k} {v:.3f}" for k, v in metrics.items() if "/" in k)
    memory = [f"{summary[k] / 1e9:.2f} GB" for k in ("driver_peak_bytes", "worker_peak_bytes")]
    for name, value in {
        "trained": f"{pluralize(summary['epochs'], 'epoch')}, {pluralize(summary['steps'], 'step')} in "
        f"{format_duration(summary['seconds'])} ({pluralize(summary['workers'], 'worker')}, "
        f"{summary['device']})",
        "metrics": shown,
        "worth": summary["worth"] or "not evaluated (evaluation.every is 0)",
        "memory": f"driver {memory[0]}, a worker {memory[1]} at the peak",
        "run folder": str(folder),
        "pictures": f"{folder}/samples/",
        "networks": f"{folder}/generator.safetensors, discriminator.safetensors",
        "checkpoints": f"{folder}/checkpoints/ (best: {summary['best']})",
        "look": f"tensorboard --logdir {shlex.quote(str(folder).removesuffix(f'/{folder.name}'))}",
        "next": f"cl-ray evaluate {where}; cl-ray report {where}",
        "go on": f"cl-ray train --name {folder.name} --storage "
        f"{shlex.quote(redact_credentials(folder.storage))} --epochs MORE",
    }.items():
        line = Text.assemble((f"{name:<12}", "bold"), value)
        console.print(line, soft_wrap=True, highlight=False)
