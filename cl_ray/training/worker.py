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

from cl_ray.checkpoint import Checkpoints
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.ray_shards import RankShard
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluation, chosen_reference, in_words, larger_is_better
from cl_ray.machine import peak_memory
from cl_ray.run import Diverged, Figures, Record, Run
from cl_ray.training.cores import Cores
from cl_ray.training.device import describe, keep_freed_memory, resolve
from cl_ray.training.evaluations import Evaluations, Job, weights_of
from cl_ray.training.folder import Folder

REFRESH = 0.25
"""Seconds between two words of progress."""
GATE = 0.05
"""Seconds between two questions whether to go on."""


def work(setup: dict[str, Any]) -> dict[str, Any]:
    """Ray Train's loop: one call on every rank, again after each failure.

    Args:
        setup: `config`, `folder`, `board`, `threads`, `gpus` that Ray gives it, and the
            `search` that it is a trial of, if any: then it asks before each epoch whether to go
            on, and evaluates in between.

    Returns:
        What rank 0 knows at the end: `status`, `figures`, `memory` and more.
    """
    board: ray.actor.ActorHandle[Any] = setup["board"]
    reason = ray.get(board.fatal.remote())  # after a failure that no new start will mend
    if reason:
        return {"status": "stopped", "reason": reason}
    try:
        return _work(setup, board)
    except Diverged as error:  # seen by all ranks at once
        return {"status": "diverged", "reason": str(error)}
    except UserError as error:
        ray.get(board.stop.remote(str(error)))
        if ray.train.get_context().get_world_size() == 1:
            return {"status": "stopped", "reason": str(error)}
        raise  # the other ranks are waiting for this one: have Train end them


def _work(setup: dict[str, Any], board: "ray.actor.ActorHandle[Any]") -> dict[str, Any]:
    config: Config = setup["config"]
    folder: Folder = setup["folder"]
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    cores = Cores(setup["threads"])
    threading.Thread(target=_import_what_is_slow, daemon=True).start()
    keep_freed_memory()
    device, dtype = resolve(config, setup["gpus"])
    if folder.read("config.yaml") is None:
        raise UserError(
            f"Worker {rank} on {socket.gethostname()} does not see {folder}: several machines "
            "need storage that all of them share: --storage s3://..., gs://... or a shared path."
        )
    shares: RankShard = ray.train.get_dataset_shard("train")
    shard = shares.open(device)
    run = Run(config, shard, device, dtype)
    checkpoints = Checkpoints(*folder.open(), keep=config.checkpoint.keep)
    newest = checkpoints.newest()
    if newest:
        run.load_state_dict(checkpoints.load(newest.name))
    where = f"worker {rank} of {workers}: {describe(device, dtype)}"
    if config.device == "auto" and not setup["gpus"] and ray.cluster_resources().get("GPU", 0):
        where += " (no GPU was asked for: --gpus-per-worker)"
    keeps = "stays on the device" if shares.share.resident else "streams"
    begun = f"goes on from {newest.name}" if newest else "starts"
    print(f"cl_ray run {folder.name}, {where} (process {os.getpid()})")
    if rank == 0:
        board.note.remote(f"{where}; its shard ({shares.share.gigabytes:.3g} GB) {keeps}; {begun}")
    search: str | None = setup["search"]
    host = Host(run, folder, checkpoints, board, search) if rank == 0 else None
    started = time.perf_counter()
    try:
        while run.epochs < config.epochs and (not search or _may_go_on(board, run.epochs)):
            with cores:
                figures = run.epoch(host.watch if host else None)
            if host:
                host.finish_epoch(figures)
            ray.train.report(figures)
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


class Host:
    """Rank 0's duties beside the training: checkpoints, journal and progress."""

    def __init__(
        self,
        run: Run,
        folder: Folder,
        checkpoints: Checkpoints,
        board: "ray.actor.ActorHandle[Any]",
        search: str | None,
    ):
        from cl_ray.training.journal import Journal  # TensorBoard is rank 0's alone

        self.run, self.folder, self.checkpoints, self.board = run, folder, checkpoints, board
        self.journal = Journal(folder, run, search)
        self.told = 0.0
        self.figures: Figures = {}
        dataset = run.shard.share.dataset
        self.best_by = best_by(run.config, dataset)
        self.evaluations = Evaluations(
            run.config,
            dataset,
            folder.name,
            run.adversary.device,
            board.note.remote,
            beside=search is None,
        )
        self.evaluation: Evaluation | None = None
        self._tell({}, 0.0, force=True)
        newest = checkpoints.newest()
        if newest and not run.position and self.journal.lacks_evaluation(run.epochs):
            self._evaluate(newest.name)  # stopped before it was over

    def watch(self, record: Record) -> None:
        """A record of the last steps: curves, progress, and a checkpoint if one is due."""
        self.journal.record(record)
        self._take_in()
        self._tell(record.figures, record.images / record.seconds)
        if record.position == self.run.shard.share.steps:
            return
        every = self.run.config.checkpoint.every
        over = bool(ray.wait([self.answer], timeout=0)[0]) and ray.get(self.answer)
        if over or (every and record.step % every == 0):
            self.journal.send()  # first, as in `finish_epoch`
            self.checkpoints.save(
                self.run.state_dict(), epoch=self.run.epochs, step=record.step, figure=None
            )
        if over:  # the host takes all ranks' processes down
            ray.get(self.board.saved.remote())
            threading.Event().wait()

    def finish_epoch(self, figures: Figures) -> None:
        """Write the epoch down, then save it.

        In this order: what is written beyond the newest checkpoint is written again by the run
        that goes on from there, and what is missing before it would be missing for good.
        """
        kind = self.best_by.partition("/")[0]
        if kind != "evaluation" and self.best_by not in figures:
            raise UserError(
                f"checkpoint.metric {self.best_by!r} is not among the epoch's figures: take "
                f"{', '.join(name for name in figures if '/' in name)}."
            )
        self.figures = figures
        self.journal.epoch(figures)
        name = self.checkpoints.save(
            self.run.state_dict(),
            epoch=self.run.epochs,
            step=self.run.adversary.steps,
            figure=figures.get(self.best_by),
        )
        self._tell(figures, figures["images_per_second"], force=True)
        self._evaluate(name)

    def _evaluate(self, checkpoint: str) -> None:
        """Begin to evaluate the networks as they are, if that is due."""
        epoch, adversary = self.run.epochs, self.run.adversary
        if self.evaluations.due(epoch):
            self.checkpoints.held.add(checkpoint)
            networks = weights_of(adversary)
            self.evaluations.start(
                Job(epoch, adversary.steps, checkpoint, networks, self.run.prior)
            )
            self._take_in()

    def _take_in(self, wait: bool = False) -> None:
        """Write down what evaluations found, and mark the best checkpoint by it."""
        for job, found in self.evaluations.finished(wait):
            if isinstance(found, str):
                self.board.note.remote(found)
                self.checkpoints.rate(job.checkpoint, None)
                continue
            figures = found.figures()
            self.journal.evaluated(job.epoch, job.step, {**figures, "seconds": found.seconds})
            self.evaluation = found
            self.folder.write("evaluation.json", json.dumps(found.to_dict(), indent=1).encode())
            kind, _, name = self.best_by.partition("/")
            best = figures.get(name) if kind == "evaluation" else None
            if best is not None and larger_is_better(name):
                best = -best
            self.checkpoints.rate(job.checkpoint, best)
            self.board.note.remote(f"epoch {job.epoch} is worth: {in_words(found)}")

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
        adversary = self.run.adversary
        return {
            "epochs": self.run.epochs,
            "steps": adversary.steps,
            "figures": self.figures,
            "evaluation": self.evaluation.figures() if self.evaluation else None,
            "worth": in_words(self.evaluation) if self.evaluation else None,
            "best": best.name if best else None,
            "device": describe(
                adversary.device, torch.bfloat16 if adversary.autocast else adversary.dtype
            ),
            "workers": self.run.shard.share.workers,
            "worker_peak_bytes": peak_memory(),
            "parameters": {
                "generator": sum(w.numel() for w in adversary.weights_g),
                "discriminator": sum(w.numel() for w in adversary.weights_d),
            },
        }

    def _tell(self, figures: Figures, speed: float, force: bool = False) -> None:
        if force or time.monotonic() - self.told > REFRESH:
            self.told = time.monotonic()
            run = self.run
            self.answer = self.board.put.remote(
                {
                    "epoch": run.epochs,
                    "position": run.position,
                    "steps": run.shard.share.steps,
                    "step": run.adversary.steps,
                    "speed": speed,
                    "figures": figures,
                    "memory": peak_memory(),
                }
            )


def best_by(config: Config, dataset: Dataset) -> str:
    """The figure that marks the best checkpoint, `auto` resolved."""
    if config.checkpoint.metric != "auto":
        return config.checkpoint.metric
    evaluation = config.evaluation
    measured = evaluation.every and chosen_reference(dataset, evaluation.reference)
    return "evaluation/frechet" if measured else "g/reconstruction"
