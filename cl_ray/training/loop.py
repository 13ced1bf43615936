"""What every worker does: host a run, epoch by epoch."""

import importlib
import json
import os
import socket
import threading
import time
from typing import Any

import ray
import ray.actor
import ray.train
import torch

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.ray_shards import ShardHandle
from cl_ray.device import describe_device, keep_freed_memory, resolve_device
from cl_ray.environment import peak_memory
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluation, is_larger_better, resolve_reference, summary_line
from cl_ray.storage import RunStorage
from cl_ray.trainer import Metrics, NonFiniteLossError, StepLog, Trainer
from cl_ray.training.async_evaluation import AsyncEvaluator, EvaluationRequest, network_weights
from cl_ray.training.cpu_affinity import CpuAffinity

REFRESH = 0.25
"""Seconds between two words of progress."""
GATE = 0.05
"""Seconds between two questions whether to go on."""


def train_loop_per_worker(setup: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's loop: one call on every rank, again after each failure.

    Args:
        setup: `config`, `folder`, `board`, `threads`, `gpus` that Ray gives it, and the
            `search` that it is a trial of, if any: then it asks before each epoch whether to go
            on, and evaluates in between.

    Returns:
        What rank 0 knows at the end: `status`, `metrics`, `memory` and more.
    """
    board: ray.actor.ActorHandle[Any] = setup["board"]
    reason = ray.get(board.fatal.remote())  # after a failure that no new start will mend
    if reason:
        return {"status": "stopped", "reason": reason}
    try:
        return _work(setup, board)
    except NonFiniteLossError as error:  # seen by all ranks at once
        return {"status": "diverged", "reason": str(error)}
    except UserError as error:
        ray.get(board.stop.remote(str(error)))
        if ray.train.get_context().get_world_size() == 1:
            return {"status": "stopped", "reason": str(error)}
        raise  # the other ranks are waiting for this one: have Train end them


def _work(setup: dict[str, Any], board: "ray.actor.ActorHandle[Any]") -> dict[str, Any]:
    config: Config = setup["config"]
    folder: RunStorage = setup["folder"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    cores = CpuAffinity(setup["threads"])
    threading.Thread(target=_import_what_is_slow, daemon=True).start()
    keep_freed_memory()
    device, dtype = resolve_device(config.device, config.precision, setup["gpus"])
    if folder.read("config.yaml") is None:
        raise UserError(
            f"Worker {rank} on {socket.gethostname()} does not see {folder}: several machines "
            "need storage that all of them share: --storage s3://..., gs://... or a shared path."
        )
    shares: ShardHandle = ray.train.get_dataset_shard("train")
    shard = shares.open(device)
    run = Trainer(config, shard, device, dtype)
    checkpoints = CheckpointStore(*folder.open(), keep=config.checkpoint.keep)
    newest = checkpoints.newest()
    if newest:
        run.load_state_dict(checkpoints.load(newest.name))
    where = f"worker {rank} of {workers}: {describe_device(device, dtype)}"
    if config.device == "auto" and not setup["gpus"] and ray.cluster_resources().get("GPU", 0):
        where += " (no GPU was asked for: --gpus-per-worker)"
    keeps = "stays on the device" if shares.partition.resident else "streams"
    begun = f"goes on from {newest.name}" if newest else "starts"
    print(f"cl_ray run {folder.name}, {where} (process {os.getpid()})")
    if rank == 0:
        board.note.remote(
            f"{where}; its shard ({shares.partition.gigabytes:.3g} GB) {keeps}; {begun}"
        )
    search: str | None = setup["search"]
    host = RankZeroHooks(run, folder, checkpoints, board, search) if rank == 0 else None
    started = time.perf_counter()
    try:
        while run.epochs < config.epochs and (not search or _may_go_on(board, run.epochs)):
            with cores:
                metrics = run.train_epoch(host.watch if host else None)
            if host:
                host.finish_epoch(metrics)
            ray.train.report(metrics)
        if host:
            host.close()
    finally:
        if host:
            host.journal.close()
    seconds = time.perf_counter() - started
    return {
        "status": "finished" if run.epochs >= config.epochs else "ended",
        "training_seconds": seconds,
        **(host.summary() if host else {}),
    }


def _may_go_on(board: "ray.actor.ActorHandle[Any]", epochs: int) -> bool:
    """Wait until it is decided whether a run of so many epochs trains another."""
    while (verdict := ray.get(board.passes.remote(epochs))) is None:
        time.sleep(GATE)
    return bool(verdict)


def _import_what_is_slow() -> None:
    """The optimiser's first use imports these, seconds of it; the images arrive meanwhile."""
    for module in ("torch._dynamo", "torch.utils.tensorboard", "torchvision.utils"):
        importlib.import_module(module)


class RankZeroHooks:
    """Rank 0's duties beside the training: checkpoints, journal and progress."""

    def __init__(
        self,
        run: Trainer,
        folder: RunStorage,
        checkpoints: CheckpointStore,
        board: "ray.actor.ActorHandle[Any]",
        search: str | None,
    ):
        from cl_ray.training.run_logger import RunLogger  # TensorBoard is rank 0's alone

        self.run, self.folder, self.checkpoints, self.board = run, folder, checkpoints, board
        self.journal = RunLogger(folder, run, search)
        self.told = 0.0
        self.metrics: Metrics = {}
        dataset = run.shard.partition.dataset
        self.best_by = resolve_checkpoint_metric(run.config, dataset)
        self.evaluations = AsyncEvaluator(
            run.config,
            dataset,
            folder.name,
            run.gan.device,
            board.note.remote,
            beside=search is None,
        )
        self.evaluation: Evaluation | None = None
        self._tell({}, 0.0, force=True)
        newest = checkpoints.newest()
        if newest and not run.position and self.journal.lacks_evaluation(run.epochs):
            self._evaluate(newest.name)  # stopped before it was over

    def watch(self, record: StepLog) -> None:
        """A record of the last steps: curves, progress, and a checkpoint if one is due."""
        self.journal.record(record)
        self._take_in()
        self._tell(record.metrics, record.images / record.seconds)
        if record.position == self.run.shard.partition.steps:
            return
        every = self.run.config.checkpoint.every
        over = bool(ray.wait([self.answer], timeout=0)[0]) and ray.get(self.answer)
        if over or (every and record.step % every == 0):
            self.journal.send()  # first, as in `finish_epoch`
            self.checkpoints.save(
                self.run.state_dict(), epoch=self.run.epochs, step=record.step, metric=None
            )
        if over:  # the host takes all ranks' processes down
            ray.get(self.board.saved.remote())
            threading.Event().wait()

    def finish_epoch(self, metrics: Metrics) -> None:
        """Write the epoch down, then save it.

        In this order: what is written beyond the newest checkpoint is written again by the run
        that goes on from there, and what is missing before it would be missing for good.
        """
        kind = self.best_by.partition("/")[0]
        if kind != "evaluation" and self.best_by not in metrics:
            raise UserError(
                f"checkpoint.metric {self.best_by!r} is not among the epoch's metrics: take "
                f"{', '.join(name for name in metrics if '/' in name)}."
            )
        self.metrics = metrics
        self.journal.epoch(metrics)
        name = self.checkpoints.save(
            self.run.state_dict(),
            epoch=self.run.epochs,
            step=self.run.gan.steps,
            metric=metrics.get(self.best_by),
        )
        self._tell(metrics, metrics["images_per_second"], force=True)
        self._evaluate(name)

    def _evaluate(self, checkpoint: str) -> None:
        """Begin to evaluate the networks as they are, if that is due."""
        epoch, gan = self.run.epochs, self.run.gan
        if self.evaluations.due(epoch):
            self.checkpoints.pinned.add(checkpoint)
            networks = network_weights(gan)
            self.evaluations.start(
                EvaluationRequest(epoch, gan.steps, checkpoint, networks, self.run.prior)
            )
            self._take_in()

    def _take_in(self, wait: bool = False) -> None:
        """Write down what evaluations found, and mark the best checkpoint by it."""
        for job, found in self.evaluations.finished(wait):
            if isinstance(found, str):
                self.board.note.remote(found)
                self.checkpoints.set_metric(job.checkpoint, None)
                continue
            metrics = found.metrics()
            self.journal.evaluated(job.epoch, job.step, {**metrics, "seconds": found.seconds})
            self.evaluation = found
            self.folder.write("evaluation.json", json.dumps(found.to_dict(), indent=1).encode())
            kind, _, name = self.best_by.partition("/")
            best = metrics.get(name) if kind == "evaluation" else None
            if best is not None and is_larger_better(name):
                best = -best
            self.checkpoints.set_metric(job.checkpoint, best)
            self.board.note.remote(f"epoch {job.epoch} is worth: {summary_line(found)}")

    def close(self) -> None:
        """Leave the networks where people look for them."""
        self._take_in(wait=True)
        newest = self.checkpoints.newest()
        if newest:
            for file in newest.files:
                if file.endswith(".safetensors"):
                    blob = self.folder.read(f"checkpoints/{newest.name}/{file}")
                    self.folder.write(file, blob or b"")

    def summary(self) -> dict[str, Any]:
        """What the end of the run looked like from here."""
        best = self.checkpoints.best()
        gan = self.run.gan
        return {
            "epochs": self.run.epochs,
            "steps": gan.steps,
            "metrics": self.metrics,
            "evaluation": self.evaluation.metrics() if self.evaluation else None,
            "worth": summary_line(self.evaluation) if self.evaluation else None,
            "best": best.name if best else None,
            "device": describe_device(gan.device, torch.bfloat16 if gan.autocast else gan.dtype),
            "workers": self.run.shard.partition.workers,
            "worker_peak_bytes": peak_memory(),
            "parameters": {
                "generator": sum(w.numel() for w in gan.g_params),
                "discriminator": sum(w.numel() for w in gan.d_params),
            },
        }

    def _tell(self, metrics: Metrics, speed: float, force: bool = False) -> None:
        if force or time.monotonic() - self.told > REFRESH:
            self.told = time.monotonic()
            run = self.run
            self.answer = self.board.put.remote(
                {
                    "epoch": run.epochs,
                    "position": run.position,
                    "steps": run.shard.partition.steps,
                    "step": run.gan.steps,
                    "speed": speed,
                    "metrics": metrics,
                    "memory": peak_memory(),
                }
            )


def resolve_checkpoint_metric(config: Config, dataset: Dataset) -> str:
    """The figure that marks the best checkpoint, `auto` resolved."""
    if config.checkpoint.metric != "auto":
        return config.checkpoint.metric
    evaluation = config.evaluation
    measured = evaluation.every and resolve_reference(dataset, evaluation.reference)
    return "evaluation/frechet" if measured else "g/reconstruction"
