"""`train`: the driver of a run, from a config to a run folder."""

import contextlib
import importlib
import json
import secrets
import shlex
import signal
import threading
import time
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from rich.console import Console

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config, LaunchOptions
from cl_ray.console import PlainConsole, print_fields, print_line
from cl_ray.data.dataset import Dataset
from cl_ray.environment import package_version, peak_memory
from cl_ray.errors import UserError, format_duration, pluralize, storage_errors
from cl_ray.evaluation.reference_name import expected_reference, packaged_reference
from cl_ray.metrics_file import read_epochs
from cl_ray.report.records import read_record
from cl_ray.signals import handle_signal
from cl_ray.storage import RunStorage, without_options
from cl_ray.training import preflight
from cl_ray.training.from_run import initial_state, resolve_from_run
from cl_ray.training.progress import TrainingProgress, start_progress_actor
from cl_ray.training.ray_session import ray_session


@dataclass(frozen=True)
class TrainResult:
    """The run folder's path or URI, and the content of its summary.json."""

    folder: str
    summary: dict[str, Any]


def train(
    config: Config | None = None,
    launch: LaunchOptions | None = None,
    console: Console | None = None,
) -> TrainResult:
    """Train the run that `config` names, or resume it.

    Args:
        config: The config; the preset `quick` if None.
        launch: How the run is started.
        console: Where progress is printed; None is a `PlainConsole`, which takes no text for
            markup.

    Returns:
        The run folder and its summary.

    Raises:
        UserError: A mistake in config, data, storage or resources, or another process trains the
            run; raised before anything is started. Later also a NaN or Inf loss, or storage that
            is full or fails.
        KeyboardInterrupt: Ctrl-C was pressed; the same call resumes from the last checkpoint.
    """
    started = time.monotonic()
    config, launch = config or Config(), launch or LaunchOptions()
    console = console or PlainConsole()
    config = config.model_copy(update={"name": config.name or default_run_name(config)})
    preflight.check_outlives_job(config.storage, "storage")
    folder = RunStorage.at(config.storage, str(config.name))
    dataset = Dataset.open(config.data)
    locations = {"storage": folder.storage, "data": dataset.location}
    config = preflight.resolve_reference_path(config.model_copy(update=locations))
    preflight.check_pairs(config, dataset)
    preflight.check_reference(config, dataset)
    if preflight.starts_local_ray(launch.address):
        preflight.check_local_resources(config)
    initial = None
    with storage_errors(folder):
        config = resolve_from_run(config, folder)
        if config.from_run and not CheckpointStore(*folder.open()).newest():
            initial = initial_state(config, dataset, console)
    expected = preflight.replace_auto_reference(config, expected_reference(dataset))
    preflight.check_checkpoint_metric(expected, dataset)
    folder.create()
    with storage_errors(folder), preflight.exclusive_lock(folder, "run"):
        return _train_locked(config, folder, dataset, launch, console, started, initial)


def default_run_name(config: Config) -> str:
    """The preset, the time, and random digits: a name that no other run has."""
    return f"{config.preset}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"


def _train_locked(
    config: Config,
    folder: RunStorage,
    dataset: Dataset,
    launch: LaunchOptions,
    console: Console,
    started: float,
    initial: dict[str, Any] | None,
) -> TrainResult:
    checkpoints = CheckpointStore(*folder.open(), keep=config.checkpoint.keep)
    for note in checkpoints.set_aside_damaged():
        print_line(console, note)
    preflight.check_resumable(config, dataset, folder, checkpoints, console)
    if launch.from_checkpoint:
        checkpoints.rollback_to(launch.from_checkpoint)
    newest = checkpoints.newest()
    if newest:
        summary = read_record(folder, "summary.json") or {}  # the run writes it again
        is_finished = summary.get("steps") == newest.step and newest.epoch >= config.epochs
        if is_finished and not launch.from_checkpoint:
            console.print(
                f"The run {folder} is finished ({pluralize(summary['epochs'], 'epoch')}); give "
                "more --epochs to resume it."
            )
            return TrainResult(folder.uri, summary)
    read_epochs(folder)  # raises if the log is damaged
    finds_reference = config.evaluation.every and config.evaluation.reference == "auto"
    if finds_reference and not packaged_reference(dataset):
        from cl_ray.evaluation.reference_cache import prepare_reference

        prepare_reference(dataset, console)
        preflight.check_checkpoint_metric(config, dataset)
    print_line(console, f"Run {folder}; to resume it: {_resume_command(folder)}")
    for note in preflight.run_notes(config, dataset):
        print_line(console, note)
    # Torch is imported while Ray starts: both take seconds.
    threading.Thread(target=importlib.import_module, args=["cl_ray.trainer"], daemon=True).start()
    with ray_session(launch.address, launch.dashboard, launch.verbose, console) as local:
        from cl_ray.training.resources import live_nodes, plan_workers, wait_for_resources

        resources = plan_workers(config, local)
        gpus, most = sum(node.get("GPU", 0) for node in live_nodes()), config.worker_range[1]
        if local and resources.gpus and gpus > most:
            note = f"The run uses {most} of {gpus:g} GPUs: --workers {gpus:g} uses all."
            print_line(console, note)
        preflight.check_shared_storage(folder)
        folder = folder.take_lease()
        folder.write("config.yaml", config.to_yaml().encode())
        if initial and not newest:
            checkpoints.save(initial, epoch=0, step=0)
        wait_for_resources(resources, config.worker_range[0], partial(print_line, console))
        if resources.waits_for:  # on nodes that were not there before
            preflight.check_shared_storage(folder)
        outcome = _fit(config, folder, dataset, launch, resources, console)
    supervision, predicted = config.supervision, dataset.info.predicted_labels
    summary = {
        **outcome,
        "name": folder.name,
        "preset": config.preset,
        "pairs": config.pairs.mode,
        "supervision": ", ".join(filter(None, (supervision, supervision and predicted))),
        "from_run": config.from_run,
        "seconds": round(time.monotonic() - started, 1),
        "driver_peak_bytes": peak_memory(),
        "versions": {
            package: package_version(package)
            for package in ("cl-ray", "ray", "torch", "torchvision", "pyarrow")
        },
    }
    # What stopped a run may be a full disk.
    with contextlib.suppress(*() if outcome["status"] == "finished" else (OSError,)):
        folder.write("summary.json", json.dumps(summary, indent=1).encode())
    if outcome["status"] != "finished":
        kept = checkpoints.newest()
        last = f"the last checkpoint is {kept.name}" if kept else "there is no checkpoint yet"
        if kept and outcome["status"] == "diverged":
            last += f"; other settings take another --name; --from-run {folder} continues from it"
        raise UserError(f"{outcome['reason']} ({folder}: {last}.)")
    _print_summary(summary, config, folder, console)
    return TrainResult(folder.uri, summary)


def _fit(
    config: Config,
    folder: RunStorage,
    dataset: Dataset,
    launch: LaunchOptions,
    resources: Any,
    console: Console,
) -> dict[str, Any]:
    """Run the workers to their end, and show their progress meanwhile."""
    import ray

    from cl_ray.training.loop import build_torch_trainer
    from cl_ray.training.ray_compat import failure_reason

    actor = start_progress_actor(f"run {folder.name}")
    trainer = build_torch_trainer(
        config, folder, dataset, resources, actor, launch.max_failures, verbose=launch.verbose
    )
    try:
        # Ray Train sets a handler of Ctrl-C of its own, and never restores the one of before.
        with TrainingProgress(console, config, actor), handle_signal(signal.SIGINT):
            result = trainer.fit()
    except SystemExit as error:  # raised by that handler
        raise KeyboardInterrupt from error
    except ray.train.TrainingFailedError as error:
        reason = None
        with contextlib.suppress(ray.exceptions.RayActorError):
            reason = ray.get(actor.abort_reason.remote())
        cause = getattr(error, "controller_failure", None)
        if reason is None and isinstance(cause, OSError):  # as where the disk is full
            raise cause from error
        if reason is None:
            raise UserError(
                f"The workers died more than {launch.max_failures} times: "
                f"{' '.join(str(error).split())[-500:]}"
            ) from error
        return {"status": "stopped", "reason": reason}
    except ray.exceptions.RayError as error:
        reason = (
            f"Ray Train's controller is lost: {failure_reason(error)}; the same command with "
            f"--name {shlex.quote(folder.name)} resumes the run."
        )
        return {"status": "stopped", "reason": reason}
    if result.return_value is None:
        raise KeyboardInterrupt
    return dict(result.return_value)


def _resume_command(folder: RunStorage) -> str:
    return shlex.join(["cl-ray", "train", "--name", folder.name, "--storage", folder.storage])


def _print_summary(
    summary: dict[str, Any], config: Config, folder: RunStorage, console: Console
) -> None:
    """Print how the run went, where its files are and what to do next."""
    uri = shlex.quote(folder.uri)
    metrics = ", ".join(f"{k} {v:.3f}" for k, v in summary["metrics"].items() if "/" in k)
    driver, worker = (
        f"{summary[key] / 1e9:.2f} GB" for key in ("driver_peak_bytes", "worker_peak_bytes")
    )
    logs = shlex.quote(without_options(folder.storage))
    few_steps = preflight.few_steps_note(summary["steps"], summary["epochs"])
    every = config.evaluation.every
    missing = "none since this start" if every else "not evaluated (evaluation.every is 0)"
    evaluation = summary["evaluation_summary"] or missing
    fields = {
        "trained": f"{pluralize(summary['epochs'], 'epoch')}, "
        f"{pluralize(summary['steps'], 'step')} in {format_duration(summary['seconds'])} "
        f"({pluralize(summary['workers'], 'worker')}, {summary['device']})",
        **({"note": few_steps} if few_steps else {}),
        "metrics": metrics,
        "evaluation": evaluation,
        "memory": f"driver {driver}, a worker {worker} at the peak",
        "run folder": str(folder),
        "samples": f"{folder}/samples/",
        "networks": f"{folder}/generator.safetensors, discriminator.safetensors",
        "checkpoints": f"{folder}/checkpoints/ (best: {summary['best']})",
        "curves": f"tensorboard --logdir {logs}",
        "next": f"cl-ray evaluate {uri}; cl-ray report {uri}",
        "resume": f"{_resume_command(folder)} --epochs MORE",
    }
    print_fields(console, fields, 12)
