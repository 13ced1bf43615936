"""Ray Train's loop: the trainer that starts the workers, what each worker runs, rank 0's hooks."""

import contextlib
import importlib
import json
import os
import socket
import threading
import time
from dataclasses import asdict
from typing import Any, TypeAlias

import ray
import ray.actor
import ray.train
import torch
from ray.train import Checkpoint, CheckpointUploadMode, FailureConfig, LoggingConfig, ScalingConfig
from ray.train.torch import TorchTrainer

from cl_ray.checkpoint import CheckpointManifest, CheckpointStore
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.partition import Partition
from cl_ray.data.ray_shards import build_train_dataset, open_loader
from cl_ray.device import CpuAffinity, describe_device, keep_freed_memory, resolve_device
from cl_ray.environment import peak_memory
from cl_ray.errors import StorageError, UserError, storage_errors
from cl_ray.evaluation.evaluate import Evaluation, summary_line
from cl_ray.evaluation.metrics import is_larger_better
from cl_ray.evaluation.reference_name import resolve_reference
from cl_ray.prior import Prior
from cl_ray.step_log import Metrics, NonFiniteLossError, StepLog
from cl_ray.storage import RunStorage, without_options
from cl_ray.trainer import Trainer
from cl_ray.training.async_evaluation import AsyncEvaluator, EvaluationRequest, copy_weights
from cl_ray.training.process_group import ProcessGroupConfig
from cl_ray.training.progress import TrialInfo, worker_failure_callback
from cl_ray.training.ray_compat import (
    build_run_config,
    forget_reported_checkpoints,
    start_autoscaling_coordinator,
)
from cl_ray.training.resources import WorkerResources

ProgressHandle: TypeAlias = "ray.actor.ActorHandle[Any]"
"""The handle of a `ProgressActor`."""

PROGRESS_INTERVAL = 0.25
"""Seconds between two progress updates."""
CONTINUE_POLL = 0.05
"""Seconds between two questions whether the run may continue."""


def build_torch_trainer(
    config: Config,
    folder: RunStorage,
    dataset: Dataset,
    resources: WorkerResources,
    progress: ProgressHandle,
    max_failures: int,
    verbose: bool = False,
    trial: TrialInfo | None = None,
) -> TorchTrainer:
    """Build the trainer of a run, which resumes from the newest checkpoint in its folder.

    This reads the training images into Ray's object store, unless the workers stream them. In a
    `trial` of a search the workers ask before each epoch whether they may continue, and
    evaluate between the epochs.
    """
    forget_reported_checkpoints(folder)
    start_autoscaling_coordinator()  # Ray Train waits for it: it starts while the images are read
    datasets, dataset_config = build_train_dataset(dataset, config, config.worker_range)
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config,
            "folder": folder,
            "dataset": dataset,
            "progress": progress,
            "threads": resources.threads,
            "gpus": resources.gpus,
            "trial": trial,
        },
        # NCCL refuses two workers on one GPU.
        torch_config=ProcessGroupConfig("gloo" if resources.gpus % 1 else None),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker=resources.bundle,
        ),
        run_config=build_run_config(
            folder,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[worker_failure_callback(progress)],
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
        ),
        datasets=datasets,
        dataset_config=dataset_config,
    )


def train_loop_per_worker(setup: dict[str, Any]) -> dict[str, Any]:
    """Run the training on one rank by `train_loop_config`; called again after each failure.

    Returns:
        `status` and `reason` or `training_seconds`; on rank 0 also the summary of the run.
    """
    progress = setup["progress"]
    reason = ray.get(progress.abort_reason.remote())
    if reason:
        return {"status": "stopped", "reason": reason}
    try:
        with storage_errors(setup["folder"]):
            return _train(setup)
    except NonFiniteLossError as error:  # raised on all ranks at once
        return {"status": "diverged", "reason": str(error)}
    except UserError as error:
        ray.get(progress.abort.remote(str(error), isinstance(error, StorageError)))
        raise  # other ranks wait for this one: let Ray Train end them


def _train(setup: dict[str, Any]) -> dict[str, Any]:
    config: Config = setup["config"]
    folder: RunStorage = setup["folder"]
    trial: TrialInfo | None = setup["trial"]
    progress = setup["progress"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    affinity = CpuAffinity(setup["threads"])
    # The log needs it, and its import takes a second: while the images are read.
    module = ["torch.utils.tensorboard"]
    threading.Thread(target=importlib.import_module, args=module, daemon=True).start()
    keep_freed_memory()
    device, dtype = resolve_device(config.device, config.precision, setup["gpus"])
    if folder.read("config.yaml") is None:
        raise UserError(
            f"Worker {rank} on {socket.gethostname()} does not see {folder}: several machines "
            "need storage that all of them share: --storage s3://..., gs://... or a shared path."
        )
    partition = Partition(setup["dataset"], config, workers, rank)
    trainer = Trainer(config, open_loader(partition, device), device, dtype)
    checkpoints = CheckpointStore(
        *folder.open(), keep=config.checkpoint.keep, before_write=folder.check_lease
    )
    newest = checkpoints.newest()
    if newest:
        trainer.load_state_dict(checkpoints.load(newest.name))
    worker = f"worker {rank} of {workers}: {describe_device(device, dtype)}"
    if config.device == "auto" and not setup["gpus"] and ray.cluster_resources().get("GPU", 0):
        worker += " (no GPU was asked for: --gpus-per-worker)"
    if device.type == "cuda" and not trainer.gan.use_cuda_graph:
        worker += " (eager steps: CUDA graphs cannot capture gloo, which workers of one GPU use)"
    owner = f"search {trial.search}, trial {folder.name}" if trial else f"run {folder.name}"
    print(f"cl_ray {owner}, {worker} (process {os.getpid()})")
    if rank == 0:
        placement = "stays on the device" if partition.resident else "streams"
        start = f"resumes from {newest.name}" if newest else "starts"
        if newest and not newest.step:
            start = f"begins with the networks of {without_options(str(config.from_run))}"
        size = f"{partition.gigabytes:.3g} GB"
        progress.add_message.remote(f"{worker}; its shard ({size}) {placement}; {start}")
    hooks = (
        RankZeroHooks(trainer, config, folder, checkpoints, progress, trial) if not rank else None
    )
    started = time.perf_counter()
    try:
        while trainer.epochs < config.epochs and (
            not trial or _may_continue(progress, trainer.epochs)
        ):
            with affinity:
                metrics = trainer.train_epoch(hooks.on_log if hooks else None)
            checkpoint = hooks.on_epoch_end(metrics) if hooks else None
            # A barrier: all ranks report equally often.
            ray.train.report(
                metrics,
                checkpoint=checkpoint,
                checkpoint_upload_mode=CheckpointUploadMode.NO_UPLOAD,
            )
        if hooks:
            hooks.on_train_end()
    finally:
        if hooks:
            # Each epoch has flushed it. A disk that fails now was named by the error before.
            with contextlib.suppress(OSError):
                hooks.logger.close()
    return {
        "status": "finished" if trainer.epochs >= config.epochs else "ended",
        "training_seconds": time.perf_counter() - started,
        **(hooks.summary() if hooks else {}),
    }


def _may_continue(progress: ProgressHandle, epochs: int) -> bool:
    """Wait until the search decides whether a run of so many epochs trains another."""
    while (decision := ray.get(progress.may_continue.remote(epochs))) is None:
        time.sleep(CONTINUE_POLL)
    return bool(decision)


class RankZeroHooks:
    """Rank 0's part beside the training: checkpoints, evaluations, the log and progress."""

    def __init__(
        self,
        trainer: Trainer,
        config: Config,
        folder: RunStorage,
        checkpoints: CheckpointStore,
        progress: ProgressHandle,
        trial: TrialInfo | None,
    ):
        from cl_ray.training.run_logger import RunLogger  # TensorBoard, which rank 0 alone needs

        self.trainer, self.config, self.folder = trainer, config, folder
        self.checkpoints, self.progress = checkpoints, progress
        self.logger = RunLogger(folder, trainer, config, trial)
        # A run that was killed after its last checkpoint takes no further step.
        last = self.logger.metrics.lines[-1] if self.logger.metrics.lines else {}
        kind, other = "evaluation/", ("evaluation/seconds", "epoch", "step")
        logged = {k: v for k, v in last.items() if k not in other}
        self.metrics: Metrics = {k: v for k, v in logged.items() if not k.startswith(kind)}
        self._logged = {k.removeprefix(kind): v for k, v in logged.items() if k.startswith(kind)}
        self.evaluation: Evaluation | None = None
        dataset = trainer.partition.dataset
        self.checkpoint_metric = resolve_checkpoint_metric(config, dataset, checkpoints.best())
        device, report = trainer.gan.device, progress.add_message.remote
        self.evaluator = AsyncEvaluator(
            config, dataset, folder.name, device, report, beside=trial is None
        )
        self._updated_at = 0.0
        self._update_progress({}, 0.0, force=True)
        if last and not self._logged:
            self._evaluate_again(last["epoch"], last["step"])

    def on_log(self, log: StepLog) -> None:
        """Log the last steps, and save a checkpoint if one is due."""
        self.logger.log_steps(log)
        self._collect_evaluations()
        self._update_progress(log.metrics, log.images / log.seconds)
        if log.position == self.trainer.partition.steps:
            return
        every = self.config.checkpoint.every
        if every and log.step % every == 0:
            self.logger.flush()  # before the checkpoint, as in `on_epoch_end`
            self._save(None)

    def on_epoch_end(self, metrics: Metrics) -> Checkpoint:
        """Log a finished epoch, save a checkpoint and start an evaluation if one is due.

        The log comes first: a resumed run writes again what is logged beyond its checkpoint, but
        not what is missing before it.

        Returns:
            The checkpoint in Ray Train's form, for its report. It lies in the run's storage folder,
            where Ray Train does not copy it; `CheckpointStore` keeps deciding what is deleted.
        """
        self.metrics = metrics
        self.logger.log_epoch(metrics)
        name = self._save(metrics.get(self.checkpoint_metric))  # an evaluation's comes later
        self._update_progress(metrics, metrics["images_per_second"], force=True)
        self._start_evaluation(name)
        return Checkpoint(f"{self.checkpoints.folder}/{name}", self.checkpoints.filesystem)

    def on_train_end(self) -> None:
        """Wait for the last evaluation, and copy the newest networks into the run folder."""
        self._collect_evaluations(wait=True)
        newest = self.checkpoints.newest()
        if newest:
            for file in newest.files:
                if file.endswith(".safetensors"):
                    blob = self.folder.read(f"checkpoints/{newest.name}/{file}")
                    self.folder.write(file, blob or b"")

    def summary(self) -> dict[str, Any]:
        """The final state of the run, for summary.json."""
        best = self.checkpoints.best()
        gan = self.trainer.gan
        return {
            "epochs": self.trainer.epochs,
            "steps": gan.steps,
            "metrics": self.metrics,
            "evaluation": self.evaluation.metrics() if self.evaluation else self._logged or None,
            "evaluation_summary": summary_line(self.evaluation) if self.evaluation else None,
            "best": best.name if best else None,
            "device": describe_device(gan.device, torch.bfloat16 if gan.autocast else gan.dtype),
            "workers": self.trainer.partition.workers,
            "worker_peak_bytes": peak_memory(),
            "parameters": {
                "generator": sum(w.numel() for w in gan.generator.parameters()),
                "discriminator": sum(w.numel() for w in gan.discriminator.parameters()),
            },
        }

    def _save(self, metric: float | None) -> str:
        trainer = self.trainer
        return self.checkpoints.save(
            trainer.state_dict(),
            epoch=trainer.epochs,
            step=trainer.gan.steps,
            metric=metric,
            metric_name=self.checkpoint_metric,
        )

    def _start_evaluation(self, checkpoint: str) -> None:
        """Evaluate the networks, which a checkpoint holds, if that is due after this epoch."""
        epoch, gan = self.trainer.epochs, self.trainer.gan
        if self.evaluator.due(epoch):
            weights = copy_weights(gan.ema_generator), copy_weights(gan.discriminator)
            self._evaluate(
                EvaluationRequest(epoch, gan.steps, checkpoint, *weights, self.trainer.prior)
            )

    def _evaluate_again(self, epoch: int, step: int) -> None:
        """Evaluate the last epoch's checkpoint: the run stopped before that was finished."""
        names = [each.name for each in self.checkpoints.list() if each.step == step]
        if names and epoch == self.trainer.epochs and self.evaluator.due(epoch):
            state = self.checkpoints.load(names[0])
            weights = state["gan"]["ema_generator"], state["gan"]["discriminator"]
            prior = Prior(**state["prior"]) if state.get("prior") else None
            self._evaluate(EvaluationRequest(epoch, step, names[0], *weights, prior))

    def _evaluate(self, request: EvaluationRequest) -> None:
        self.checkpoints.pinned.add(request.checkpoint)
        self.evaluator.start(request)
        self._collect_evaluations()

    def _collect_evaluations(self, wait: bool = False) -> None:
        """Log finished evaluations, and set their checkpoints' metric if they select the best."""
        for request, evaluation in self.evaluator.results(wait):
            if isinstance(evaluation, str):
                self.progress.add_message.remote(evaluation)
                self.checkpoints.set_metric(request.checkpoint, None, self.checkpoint_metric)
                continue
            metrics = evaluation.metrics()
            self.logger.log_evaluation(
                request.epoch, request.step, {**metrics, "seconds": evaluation.seconds}
            )
            self.evaluation = evaluation
            text = json.dumps(asdict(evaluation), indent=1)
            self.folder.write("evaluation.json", text.encode())
            kind, _, name = self.checkpoint_metric.partition("/")
            value = metrics.get(name) if kind == "evaluation" else None
            if value is not None and is_larger_better(name):
                value = -value
            self.checkpoints.set_metric(request.checkpoint, value, self.checkpoint_metric)
            self.progress.add_message.remote(
                f"epoch {request.epoch} evaluation: {summary_line(evaluation)}"
            )

    def _update_progress(self, metrics: Metrics, speed: float, force: bool = False) -> None:
        if not force and time.monotonic() - self._updated_at <= PROGRESS_INTERVAL:
            return
        self._updated_at = time.monotonic()
        trainer = self.trainer
        self.progress.update.remote(
            {
                "epoch": trainer.epochs,
                "position": trainer.position,
                "steps": trainer.partition.steps,
                "step": trainer.gan.steps,
                "speed": speed,
                "metrics": metrics,
                "memory": peak_memory(),
            }
        )


def resolve_checkpoint_metric(
    config: Config, dataset: Dataset, best: CheckpointManifest | None
) -> str:
    """The metric that selects the best checkpoint, with `auto` resolved.

    A resumed run keeps the one that its `best` checkpoint so far was selected by, also where it is
    not evaluated any more or a reference was found since: values of two metrics do not compare.
    """
    if config.checkpoint.metric != "auto":
        return config.checkpoint.metric
    if best and best.metric_name:
        return best.metric_name
    evaluation = config.evaluation
    measured = evaluation.every and resolve_reference(dataset, evaluation.reference)
    return "evaluation/frechet" if measured else "g/reconstruction"
