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

from cl_ray.checkpoint import Checkpoints
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.share import NOT_STREAMED, Share
from cl_ray.errors import UserError, without_keys
from cl_ray.losses.terms import term_names
from cl_ray.machine import peak_memory, version
from cl_ray.training.alone import alone
from cl_ray.training.cluster import running_ray, see_that_nodes_share
from cl_ray.training.earlier import look_back
from cl_ray.training.folder import Folder
from cl_ray.training.here import see_that_it_can, starts_here
from cl_ray.training.progress import Progress, clock, counted
from cl_ray.training.signals import answered


@dataclass(frozen=True)
class Launch:
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
class Trained:
    """What came out.

    Args:
        folder: The run folder's path or URI.
        summary: What summary.json holds.
    """

    folder: str
    summary: dict[str, Any]


def train(
    config: Config | None = None, launch: Launch | None = None, console: Console | None = None
) -> Trained:
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
    config, launch = config or Config(), launch or Launch()
    console = console or Console()
    begun = time.monotonic()
    config = config.model_copy(update={"name": config.name or fresh_name(config)})
    folder = Folder.at(config.storage, str(config.name))
    dataset = Dataset.open(config.data)
    places = {"storage": folder.storage, "data": dataset.location}
    config = config.model_copy(update={k: without_keys(v) for k, v in places.items()})
    check_pairs(config, dataset)
    check_reference(config, dataset)
    check_best(config, dataset)
    if starts_here(launch.address):
        see_that_it_can(config)
    folder.prepare()
    with alone(folder, "run"):
        return _train(config, folder, dataset, launch, console, begun)


def _train(
    config: Config,
    folder: Folder,
    dataset: Dataset,
    launch: Launch,
    console: Console,
    begun: float,
) -> Trained:
    """Train in a folder that nobody else writes."""
    checkpoints = Checkpoints(*folder.open(), keep=config.checkpoint.keep)
    look_back(config, folder, checkpoints, console)
    if launch.from_checkpoint:
        checkpoints.return_to(launch.from_checkpoint)
    newest = checkpoints.newest()
    if newest:
        checkpoints.check(newest.name)
        summary = json.loads(folder.read("summary.json") or b"{}")
        if newest.epoch >= config.epochs and summary.get("epochs", 0) >= newest.epoch:
            return _finished(folder, summary, console)
    with running_ray(launch.address, launch.dashboard, launch.verbose, console) as local:
        from cl_ray.training.capacity import plan, wait_for_room

        capacity = plan(config, local)
        if not folder.remote:
            see_that_nodes_share(folder)
        folder.write("config.yaml", config.to_yaml().encode())
        wait_for_room(
            capacity, config.worker_range[0], lambda line: console.print(line, soft_wrap=True)
        )
        outcome = _fit(config, folder, dataset, launch, capacity, console)
    summary = _summary(outcome, folder, config, begun)
    if outcome["status"] != "finished":
        kept = checkpoints.newest()
        last = f"the last checkpoint is {kept.name}" if kept else "there is no checkpoint yet"
        raise UserError(f"{outcome['reason']} ({folder}: {last}.)")
    _show(summary, folder, console)
    return Trained(folder.uri, summary)


def fresh_name(config: Config) -> str:
    """A name that no earlier run has: the preset and the time."""
    return f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S}"


def check_pairs(config: Config, dataset: Dataset) -> None:
    """See that the data can give pairs at all, without reading an image.

    Raises:
        UserError: No split `train`, no labels or one class where the pairs need them, too few
            images, or all of them alike.
    """
    dataset.groups("train")
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
        fewest = Share(dataset, config, config.worker_range[0])
        if not fewest.resident:
            raise UserError(NOT_STREAMED)
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


def check_best(config: Config, dataset: Dataset) -> None:
    """See that the figure that is to mark the best checkpoint is there, or is measured.

    Raises:
        UserError: It is not.
    """
    kind, _, name = config.checkpoint.metric.partition("/")
    if kind != "evaluation":
        there = term_names(config)
        if config.checkpoint.metric not in ("auto", *there):
            raise UserError(
                f"checkpoint.metric {config.checkpoint.metric!r} is not among the figures of an "
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
    from cl_ray.evaluation.measured import see_that_measured

    see_that_measured(name, config, dataset, "checkpoint.metric", prefix="evaluation/")


def _finished(folder: Folder, summary: dict[str, Any], console: Console) -> Trained:
    console.print(
        f"The run {folder} is finished ({counted(summary['epochs'], 'epoch')}); give more "
        "--epochs to go on."
    )
    return Trained(folder.uri, summary)


def _fit(
    config: Config,
    folder: Folder,
    dataset: Dataset,
    launch: Launch,
    capacity: Any,
    console: Console,
) -> dict[str, Any]:
    """Run the workers to their end; the progress is shown by a thread beside."""
    import ray

    from cl_ray.training.deaths import reason_of
    from cl_ray.training.trainer import board_for, trainer_for

    board = board_for(folder)
    trainer = trainer_for(
        config, folder, dataset, capacity, board, launch.max_failures, verbose=launch.verbose
    )
    over = threading.Event()
    with Progress(console, config.epochs) as progress:
        watcher = threading.Thread(target=_watch, args=(board, progress, config, over), daemon=True)
        watcher.start()
        try:
            # Ray Train answers Ctrl-C in its own way and would, in a notebook, for ever after.
            with answered(signal.SIGINT):
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
                "reason": f"Ray Train's controller is lost: {reason_of(error)}; the same command "
                f"with --name {folder.name} goes on.",
            }
        finally:
            over.set()
            watcher.join(timeout=5)
    outcome = result.return_value
    if outcome is None:
        raise KeyboardInterrupt
    return dict(outcome)


def _watch(board: Any, progress: Progress, config: Config, over: threading.Event) -> None:
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
    outcome: dict[str, Any], folder: Folder, config: Config, begun: float
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
        "versions": {package: version(package) for package in packages},
    }
    folder.write("summary.json", json.dumps(summary, indent=1).encode())
    return summary


def _show(summary: dict[str, Any], folder: Folder, console: Console) -> None:
    """The last lines: how it went, where everything lies, how to look at it."""
    figures, where = summary["figures"], shlex.quote(without_keys(folder.uri))
    shown = ", ".join(f"{k} {v:.3f}" for k, v in figures.items() if "/" in k)
    memory = [f"{summary[k] / 1e9:.2f} GB" for k in ("driver_peak_bytes", "worker_peak_bytes")]
    for name, value in {
        "trained": f"{counted(summary['epochs'], 'epoch')}, {counted(summary['steps'], 'step')} in "
        f"{clock(summary['seconds'])} ({counted(summary['workers'], 'worker')}, "
        f"{summary['device']})",
        "figures": shown,
        "worth": summary["worth"] or "not evaluated (evaluation.every is 0)",
        "memory": f"driver {memory[0]}, a worker {memory[1]} at the peak",
        "run folder": str(folder),
        "pictures": f"{folder}/samples/",
        "networks": f"{folder}/generator.safetensors, discriminator.safetensors",
        "checkpoints": f"{folder}/checkpoints/ (best: {summary['best']})",
        "look": f"tensorboard --logdir {shlex.quote(str(folder).removesuffix(f'/{folder.name}'))}",
        "next": f"cl-ray evaluate {where}; cl-ray report {where}",
        "go on": f"cl-ray train --name {folder.name} --storage "
        f"{shlex.quote(without_keys(folder.storage))} --epochs MORE",
    }.items():
        line = Text.assemble((f"{name:<12}", "bold"), value)
        console.print(line, soft_wrap=True, highlight=False)
