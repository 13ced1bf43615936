"""The trials that Ray Tune runs: one in its own process, one as a TorchTrainer of several workers.

Both have a run folder like any other run, resume from its newest checkpoint, report after every
epoch, and pass their process on to the next trial.
"""

import contextlib
import gc
import math
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray import tune

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config, leaves
from cl_ray.cuda_graph import release_graphs
from cl_ray.data.dataset import Dataset, RowBatch
from cl_ray.data.loaders import InMemoryLoader, StreamingLoader
from cl_ray.data.partition import TRAIN_SPLIT, Partition
from cl_ray.device import CpuAffinity, keep_freed_memory, resolve_device
from cl_ray.errors import StorageError, UserError, printable, storage_errors
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.metrics_file import read_epochs
from cl_ray.model import TrainedModel, load
from cl_ray.step_log import Metrics, NonFiniteLossError, StepLog
from cl_ray.storage import LeaseLostError, RunStorage
from cl_ray.trainer import Trainer
from cl_ray.training.loop import build_torch_trainer
from cl_ray.training.progress import TrialInfo, start_progress_actor
from cl_ray.training.ray_compat import session_log_dir
from cl_ray.training.resources import WorkerResources
from cl_ray.training.run_logger import RunLogger
from cl_ray.tuning.space import Space, apply_values
from cl_ray.tuning.study import SearchMetric

ERROR_FILE = "error.txt"
"""File of a trial's folder with the traceback of its last error."""

_COLLAPSED_VARIANCE = 1e-3
"""G has collapsed if its samples vary less than this fraction of what real images do."""
_COLLAPSE_MIN_STEPS = 100
"""Steps before which samples may still be alike."""
_MAX_WAIT = 30.0
"""Longest time in seconds between two reports of a trial that waits for another's weights."""
_EXPLOIT_FILE = "state.pt"
_POLL_INTERVAL = 0.1
"""Seconds between two looks at how far the workers of a trial are."""
_SHUTDOWN_TIMEOUT = 300.0
"""Seconds that the workers of a trial may take to end."""
_MAX_FAILURES = 3
"""Times that dead workers are started again within one attempt at a trial."""


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search have in common.

    Args:
        folder: The folder of the trials' run folders.
        base: The config that a trial's values change.
        resources: What each worker of a trial asks for.
        exploits: Whether the scheduler is population-based training: then a trial that diverged
            waits for another's weights.
    """

    search: str
    folder: RunStorage
    space: Space
    base: Config
    dataset: Dataset
    metrics: list[SearchMetric]
    resources: WorkerResources
    exploits: bool = False


class SearchTrial(tune.Trainable, ABC):
    """A Tune trainable that trains one trial after another in the same process.

    The `config` that Tune hands in holds a `point`: the trial's `number` and `values`. Subclasses
    train: they implement `setup`, `start`, `train_epoch` and `cleanup`.
    """

    context: TrialContext
    run_config: Config

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Take another trial, or the same one with another's values."""
        self.assign(new_config)
        return True

    def assign(self, config: dict[str, Any]) -> None:
        """Take a trial, which its first step starts.

        While a process is created for a trial, Ray Tune may give the trial to one that has become
        free, and end the new one once it is up: that one must not have touched the trial's folder.
        """
        self.number, self.values = config["point"]["number"], config["point"]["values"]
        self.folder = self.context.folder.subfolder(f"{self.number:04d}")
        self.ended = self.reason = ""
        self.notes: list[str] = []
        place = {"name": self.folder.name, "storage": self.folder.storage}
        self.run_config = apply_values(self.context.base, self.values).model_copy(update=place)
        self.is_started = False

    def ensure_started(self) -> None:
        """Set the trial up unless it is, and resume it from its newest checkpoint if it has one.

        It takes the folder's lease. So a process that Ray Tune has lost sight of, and replaced by
        this one, can no longer write there.
        """
        if self.is_started:
            return
        self.cleanup()  # of the last trial
        self.folder = self.folder.take_lease()
        self.folder.write("config.yaml", self.run_config.to_yaml().encode())
        state = self.start()
        self.is_started = True
        self._log(f"{state}: {', '.join(f'{f}={value}' for f, value in self.values.items())}")

    def _open_checkpoints(self) -> CheckpointStore:
        """Open the trial's checkpoints, of which damaged ones are put aside with a note."""
        checkpoints = CheckpointStore(
            *self.folder.open(),
            keep=self.run_config.checkpoint.keep,
            before_write=self.folder.check_lease,
        )
        self.notes += checkpoints.set_aside_damaged()
        return checkpoints

    def step(self) -> dict[str, Any]:
        """Train one epoch and evaluate it; see `_result`.

        Storage that is full or fails is no failure of the trial: it is reported as
        `storage_fault`, and ends the search.
        """
        try:
            with storage_errors(self.folder), self._recorded_errors():
                self.ensure_started()
                result = self.train_epoch()
        except StorageError as error:
            worst = {metric.name: metric.worst for metric in self.context.metrics}
            return {**worst, "number": self.number, "epoch": 0, "storage_fault": str(error)}
        result["notes"], self.notes = self.notes, []
        scores = ", ".join(f"{m.name} {result[m.name]:.4g}" for m in self.context.metrics)
        self._log(f"epoch {result['epoch']}: {result['reason'] or scores}; {result['status']}")
        return result

    @abstractmethod
    def start(self) -> str:
        """Get ready to train; return whether the trial starts or where it resumes."""

    @abstractmethod
    def train_epoch(self) -> dict[str, Any]:
        """Train and evaluate one epoch, or repeat the result of the last one."""

    @property
    def info(self) -> TrialInfo:
        """What its run knows of the search."""
        metrics = [metric.name for metric in self.context.metrics]
        hparams = self.context.space.hparams(self.run_config)
        return TrialInfo(self.context.search, hparams, metrics)

    def _result(self, line: dict[str, Any], epochs: int) -> dict[str, Any]:
        """Return what Tune and the study are told, from a line of metrics.jsonl.

        A trial whose optimized metric is NaN or Inf has collapsed: it compares with nothing.
        """
        prefix = "evaluation/"
        evaluation = {k.removeprefix(prefix): v for k, v in line.items() if k.startswith(prefix)}
        for metric in self.context.metrics if evaluation else ():
            value = evaluation.get(metric.name)
            if value is None or not math.isfinite(value):
                found = "could not be measured" if value is None else f"is {value}"
                self.ended = "collapsed"
                self.reason = f"{metric.name} {found} after epoch {epochs}."
                evaluation = {}
                break
        losses = {k: v for k, v in line.items() if k.startswith(("d/", "g/"))}
        first = f"{prefix}{self.context.metrics[0].name}"
        lines = self.lines()
        finished = epochs >= self.run_config.epochs
        return {
            **{m.name: evaluation.get(m.name, m.worst) for m in self.context.metrics},
            "number": self.number,
            "values": self.values,
            "epoch": epochs,
            "metrics": {**evaluation, **losses},
            "history": {
                line["epoch"]: line[first]
                for line in lines
                if math.isfinite(line.get(first, math.nan))
            },
            "seconds": sum(line.get("seconds", 0.0) for line in lines),
            "speed": line.get("images_per_second", 0.0),
            "status": self.ended or ("finished" if finished else "running"),
            "reason": self.reason,
            "done": finished or bool(self.ended and not self.context.exploits),
        }

    @abstractmethod
    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of metrics.jsonl, one an epoch."""

    def _collapse_reason(self, model: TrainedModel, epochs: int) -> str | None:
        """Return a sentence if G makes the same image of all noise; more epochs do not help."""
        if model.step < _COLLAPSE_MIN_STEPS:
            return None
        dataset = self.context.dataset
        real = dataset.read(TRAIN_SPLIT, dataset.row_groups(TRAIN_SPLIT)[:1]).image[:1000]
        samples, images = (x.astype("float32").var(0).mean() for x in (model.generate(64), real))
        if samples >= _COLLAPSED_VARIANCE * images:
            return None
        return (
            f"G makes the same image of all noise after epoch {epochs}: its samples vary "
            f"{samples / images:.1e} times as much as real images."
        )

    def _log(self, line: str) -> None:
        """Write a line to the process's log, and to the trial's own on the dashboard's Logs page.

        Ray fixes an actor's name when it starts, and this process runs one trial after another: in
        the dashboard a trial is found by this file's name.
        """
        search = self.context.search
        line = printable(f"cl_ray search {search}, trial {self.number} {line}", keep="\n")
        print(line, flush=True)
        if folder := session_log_dir():
            with (folder / f"trial-{search}-{self.number:04d}.log").open("a") as log:
                log.write(f"{line}\n")

    @contextlib.contextmanager
    def _recorded_errors(self) -> Iterator[None]:
        """Write an exception to the trial's folder, where the leaderboard finds it."""
        try:
            yield
        except (OSError, StorageError):
            raise
        except Exception:
            self._log(f"failed:\n{traceback.format_exc()}")
            self.folder.write(ERROR_FILE, traceback.format_exc().encode())
            raise

    def __repr__(self) -> str:
        """Return what the dashboard shows of the process, read once, when its first trial is."""
        return f"search {self.context.search}: trial {self.number:04d} and later ones"


class LocalTrial(SearchTrial):
    """A trial of one worker, which trains in its own process.

    The next trial takes over the process, with the training data and the evaluator.
    """

    def setup(
        self,
        config: dict[str, Any],
        context: TrialContext,
        rows: RowBatch | None,
        evaluator: Evaluator,
    ) -> None:
        """Take what all trials share from the object store, and the first trial."""
        self.cpu_affinity = CpuAffinity(context.resources.threads)
        keep_freed_memory()
        self.rows, self.evaluator = rows, evaluator
        self.logger: RunLogger | None = None
        self.epoch_seconds = 1.0
        self.context = context
        self.assign(config)

    def start(self) -> str:
        """Build the trainer, and load its newest checkpoint."""
        self._free_trainer()
        self.trainer, self.copied_epoch = self._build_trainer(), 0
        self.checkpoints = self._open_checkpoints()
        newest = self.checkpoints.newest()
        if newest:
            self._load_state(self.checkpoints.load(newest.name))
        self._open_logger()
        return f"resumes from {newest.name}" if newest else "starts"

    def _free_trainer(self) -> None:
        """Free what the last trial has on the device: two trainers may not fit.

        A GAN and its CUDA graph refer to each other.
        """
        release_graphs()
        self.__dict__.pop("trainer", None)
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _build_trainer(self) -> Trainer:
        device, dtype = resolve_device(
            self.run_config.device, self.run_config.precision, self.context.resources.gpus
        )
        partition = Partition(self.context.dataset, self.run_config)
        loader = (
            StreamingLoader.read(partition, device)
            if self.rows is None
            else InMemoryLoader(partition, self.rows, device)
        )
        return Trainer(self.run_config, loader, device, dtype)

    def _load_state(self, state: dict[str, Any]) -> None:
        """Load a state, with the architecture that its weights are of.

        In population-based training that may be another trial's: Tune loads a trial's own
        checkpoint before another's, and a killed trial may find another's weights in its folder
        before the study knows of them.
        """
        saved = Config.from_yaml(state["config"])
        noise = {"latent_noise_std": self.run_config.generator.latent_noise_std}
        generator = saved.generator.model_copy(update=noise)
        networks = {"generator": generator, "discriminator": saved.discriminator}
        adopted = self.run_config.model_copy(update=networks)
        if adopted != self.run_config:
            self.run_config = adopted
            fields = dict(leaves(adopted.model_dump()))
            self.values = {field: fields[field] for field in self.values}
            self.folder.write("config.yaml", adopted.to_yaml().encode())
            self.cleanup()
            self._free_trainer()
            self.trainer = self._build_trainer()
        self.trainer.load_state_dict(state)

    def _open_logger(self) -> None:
        self.logger = RunLogger(self.folder, self.trainer, self.run_config, self.info)

    def train_epoch(self) -> dict[str, Any]:
        """Train one epoch, save it and evaluate it."""
        assert self.logger is not None
        trainer, logger = self.trainer, self.logger
        if self.ended:  # diverged in a population: wait about an epoch for another's weights
            time.sleep(self.epoch_seconds)
            trainer.epochs += 1
            return self._result({}, trainer.epochs)
        evaluated = bool(trainer.epochs) and (
            trainer.epochs == self.copied_epoch or not logger.lacks_evaluation(trainer.epochs)
        )
        if trainer.epochs >= trainer.config.epochs and not trainer.position and evaluated:
            # It has ended, and Tune has not heard of it.
            return self._result(logger.metrics.lines[-1], trainer.epochs)
        if trainer.position or not trainer.epochs or evaluated:
            with self.cpu_affinity:
                try:
                    metrics = trainer.train_epoch(self._on_log)
                except NonFiniteLossError as error:
                    return self._end("diverged", str(error))
                self.epoch_seconds = min(metrics["seconds"], _MAX_WAIT)
                logger.log_epoch(metrics)
                self._save()
        model = TrainedModel.from_trainer(trainer)
        reason = self._collapse_reason(model, trainer.epochs)
        if reason is None:
            try:
                metrics = self._evaluate(model)
            except UserError as error:
                reason = str(error)
        if reason is not None:
            return self._end("collapsed", reason)
        logger.log_evaluation(trainer.epochs, trainer.gan.steps, metrics)
        return self._result(logger.metrics.lines[-1], trainer.epochs)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines that the logger has."""
        assert self.logger is not None
        return self.logger.metrics.lines

    def _on_log(self, record: StepLog) -> None:
        """Log steps; save where a checkpoint is due within the epoch."""
        assert self.logger is not None
        self.logger.log_steps(record)
        if record.position == self.trainer.loader.partition.steps:
            return
        every = self.trainer.config.checkpoint.every
        if every and record.step % every == 0:
            self.logger.flush()
            self._save()

    def _save(self) -> None:
        trainer = self.trainer
        self.checkpoints.save(trainer.state_dict(), epoch=trainer.epochs, step=trainer.gan.steps)

    def _evaluate(self, model: TrainedModel) -> Metrics:
        discriminator = self.trainer.gan.discriminator
        discriminator.eval()
        metrics = self.evaluator.evaluate(model).metrics()
        discriminator.train()
        return metrics

    def _end(self, status: str, reason: str) -> dict[str, Any]:
        """End the trial with the worst score; in a population, wait for another's weights."""
        self.ended, self.reason = status, reason
        trainer = self.trainer
        if self.context.exploits and status == "diverged":
            trainer.epochs, trainer.position, trainer.sums = trainer.epochs + 1, 0, {}
        return self._result({}, trainer.epochs)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """Save what another trial of a population loads."""
        torch.save(self.trainer.state_dict(), Path(checkpoint_dir) / _EXPLOIT_FILE)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Load the networks, optimizers and position of a trial, another one or this one."""
        assert isinstance(checkpoint, str)
        self.ensure_started()
        file = Path(checkpoint) / _EXPLOIT_FILE
        self._load_state(torch.load(file, map_location="cpu", weights_only=True))
        name = f"step-{self.trainer.gan.steps:08d}"
        self.checkpoints.pinned = {name}  # though its own newest may have more steps
        self._save()
        self.checkpoints.rollback_to(name)
        self.checkpoints.pinned = set()
        self.cleanup()
        # A new logger drops the lines of its own epochs beyond that.
        self._open_logger()
        self.copied_epoch = self.trainer.epochs  # evaluated by the other trial
        self.ended = self.reason = ""

    def cleanup(self) -> None:
        """Close the files of the last trial."""
        if self.logger is not None:
            logger, self.logger = self.logger, None
            with contextlib.suppress(LeaseLostError):  # another process trains it now
                logger.close()


class DistributedTrial(SearchTrial):
    """A trial of several workers: a TorchTrainer that this process lets train epoch by epoch.

    Ray Tune stops a trial by ending its process, and what a trainer in it had placed is then
    released only through the dashboard's state API: without a dashboard, or with another Ray
    cluster on the machine, the search would hang (ray#54305 is related). So no trainer is ever
    killed: before each epoch its workers wait for permission from the progress actor, and the
    trainer of a stopped trial ends there. `callbacks.OrphanedPlacementGroups` releases what the
    trainer of a killed process leaves.
    """

    trainer: threading.Thread | None = None

    def setup(self, config: dict[str, Any], context: TrialContext) -> None:
        """Take the first trial."""
        self.context = context
        self.assign(config)

    def start(self) -> str:
        """Start the workers, which wait before their first epoch."""
        newest = self._open_checkpoints().newest()
        self.epochs = newest.epoch if newest else 0
        owner = f"search {self.context.search}, trial {self.folder.name}"
        self.progress, self.failures_seen = start_progress_actor(owner), 0
        self.outcome: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.trainer = threading.Thread(target=self._fit, daemon=True)
        self.trainer.start()
        return f"resumes from {newest.name}" if newest else "starts"

    def train_epoch(self) -> dict[str, Any]:
        """Let the workers train one epoch, and read what they logged."""
        assert self.trainer is not None
        target = min(self.epochs + 1, self.run_config.epochs)
        ray.get(self.progress.set_epoch_limit.remote(target))
        while self.trainer.is_alive() and ray.get(self.progress.reached_epoch.remote()) < target:
            time.sleep(_POLL_INTERVAL)
        if not self.trainer.is_alive():
            self._check_outcome()
        line: dict[str, Any] = {}
        if not self.ended:
            self.epochs = target
            line = next((line for line in self.lines() if line["epoch"] == target), {})
            evaluated = any(key.startswith("evaluation/") for key in line)
            collapse = self._collapse_reason(load(self.folder.uri, device="cpu"), target)
            if collapse or not evaluated:
                notes = ray.get(self.progress.state.remote(0))[1]
                self.ended, self.reason = "collapsed", collapse or (notes or ["no metrics"])[-1]
                line = {}
        failures: list[str] = ray.get(self.progress.failures.remote(self.failures_seen))
        self.failures_seen += len(failures)
        self.notes += failures
        return self._result(line, self.epochs)

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines that the workers have written."""
        return read_epochs(self.folder)

    def _fit(self) -> None:
        try:
            trainer = build_torch_trainer(
                self.run_config,
                self.folder,
                self.context.dataset,
                self.context.resources,
                self.progress,
                _MAX_FAILURES,
                trial=self.info,
            )
            self.outcome = trainer.fit().return_value
        except BaseException as error:  # raised by `_check_outcome`, in the trial's own thread
            self.error = error

    def _check_outcome(self) -> None:
        """Record a NaN or Inf loss.

        Raises:
            UserError: The workers failed; the sentence is theirs where they left one.
            StorageError: The storage is full or fails.
        """
        if ray.get(self.progress.storage_failed.remote()):
            raise StorageError(ray.get(self.progress.abort_reason.remote()))
        if self.error is not None:
            reason = ray.get(self.progress.abort_reason.remote())
            raise UserError(reason or " ".join(str(self.error).split())[-500:]) from self.error
        outcome = self.outcome or {"status": "stopped", "reason": "the workers were stopped"}
        if outcome["status"] == "diverged":
            self.ended, self.reason = "diverged", outcome["reason"]
        elif outcome["status"] == "stopped":
            raise UserError(outcome["reason"])

    def cleanup(self) -> None:
        """Have the workers end, and wait for it."""
        if self.trainer is not None:
            ray.get(self.progress.stop.remote())
            self.trainer.join(timeout=_SHUTDOWN_TIMEOUT)
            self.trainer = None
