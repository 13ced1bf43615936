"""A trial of one worker: trained and measured in the trial's own process."""

import time
from pathlib import Path
from typing import Any

import torch

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config, leaves
from cl_ray.data.dataset import RowBatch
from cl_ray.data.loaders import InMemoryLoader, StreamingLoader
from cl_ray.data.partition import Partition
from cl_ray.device import keep_freed_memory, resolve_device
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.model import TrainedModel
from cl_ray.trainer import Metrics, NonFiniteLossError, StepLog, Trainer
from cl_ray.training.cpu_affinity import CpuAffinity
from cl_ray.training.run_logger import RunLogger
from cl_ray.tuning.stop_signal import StopListener
from cl_ray.tuning.trial import SearchTrial, TrialContext, save_sample_grid

LONGEST_WAIT = 30.0
"""Seconds between two words of a trial that waits to be replaced."""
STATE = "state.pt"


class LocalTrial(SearchTrial):
    """Trains in its own process, which the next trial takes over, data and evaluator with it."""

    def setup(
        self, config: dict[str, Any], job: TrialContext, rows: RowBatch | None, evaluator: Evaluator
    ) -> None:
        """Take what all trials share out of the object store, and begin the first."""
        self.cores = CpuAffinity(job.plan.threads)
        keep_freed_memory()
        self.rows, self.evaluator = rows, evaluator
        self.journal: RunLogger | None = None
        self.pace = 1.0
        self.job, self.listener = job, StopListener(job.bell)
        self.begin(config)

    def open(self) -> str:
        """Set the run up, or load its newest checkpoint."""
        self.run = self._run()
        self.checkpoints = CheckpointStore(*self.folder.open(), keep=1)
        newest = self.checkpoints.newest()
        if newest:
            self._restore(self.checkpoints.load(newest.name))
        self.journal = RunLogger(self.folder, self.run, self.job.search)
        return "goes on from " + newest.name if newest else "starts"

    def _run(self) -> Trainer:
        """A run at its start."""
        device, dtype = resolve_device(self.run_config, self.job.plan.gpus)
        share = Partition(self.job.dataset, self.run_config)
        shard = (
            InMemoryLoader(share, self.rows, device)
            if self.rows is not None
            else StreamingLoader.read(share, device)
        )
        return Trainer(self.run_config, shard, device, dtype)

    def _restore(self, state: dict[str, Any]) -> None:
        """Load a state; the architecture goes with the weights.

        A trial of a population finds its own last checkpoint before it takes over a trial of
        another architecture; killed after that, it finds the other's, whatever the study knows.
        """
        theirs = Config.from_yaml(state["config"])
        networks = {"generator": theirs.generator, "discriminator": theirs.discriminator}
        adopted = self.run_config.model_copy(update=networks)
        if adopted != self.run_config:
            self.run_config = adopted
            fields = dict(leaves(adopted.model_dump()))
            self.values = {field: fields[field] for field in self.values}
            self.folder.write("config.yaml", adopted.to_yaml().encode())
            self.run = self._run()
        self.run.load_state_dict(state)

    def advance(self) -> dict[str, Any]:
        """Train for an epoch, save it and measure it."""
        assert self.journal is not None
        run, journal = self.run, self.journal
        if self.ended:  # of a population: waits about an epoch to take over another's weights
            time.sleep(self.pace)
            run.epochs += 1
            return self.told({}, run.epochs)
        measured = bool(run.epochs) and not journal.lacks_evaluation(run.epochs)
        if run.epochs >= run.config.epochs and not run.position and measured:
            return self.told(self.lines()[-1], run.epochs)  # its end was not heard of before
        if run.position or not run.epochs or measured:
            with self.listener.steps(self.number), self.cores:
                try:
                    metrics = run.train_epoch(self.watch)
                except NonFiniteLossError as error:
                    return self._end("diverged", str(error))
                self.pace = min(metrics["seconds"], LONGEST_WAIT)
                journal.epoch(metrics)
                self._save()
        try:
            metrics = self._evaluate()
        except UserError as error:
            return self._end("collapsed", str(error))
        journal.evaluated(run.epochs, run.gan.steps, metrics)
        return self.told(self.lines()[-1], run.epochs)

    def watch(self, record: StepLog) -> None:
        """Curves, and a checkpoint if one is due within the epoch, or the search is to end."""
        assert self.journal is not None
        self.journal.record(record)
        if record.position == self.run.shard.partition.steps:
            return
        every = self.run.config.checkpoint.every
        over = self.listener.hears()
        if over or (every and record.step % every == 0):
            self.journal.send()
            self._save()
        if over:
            self.listener.wait_for_the_end(self.number)

    def _save(self) -> None:
        run = self.run
        self.checkpoints.save(run.state_dict(), epoch=run.epochs, step=run.gan.steps, figure=None)

    def _evaluate(self) -> Metrics:
        gan = self.run.gan
        loaded = TrainedModel(
            config=self.run.config,
            shape=gan.shape,
            checkpoint=f"step-{gan.steps:08d}",
            step=gan.steps,
            generator=gan.ema_generator,
            discriminator=gan.discriminator,
            device=gan.device,
            classes=gan.classes,
            counts=tuple(self.run.shard.partition.counts),
            prior=self.run.prior,
        )
        collapsed = save_sample_grid(loaded, self.job, self.run.epochs)
        if collapsed:
            raise UserError(collapsed)
        gan.discriminator.eval()  # the training must not notice
        metrics = self.evaluator.evaluate(loaded).metrics()
        gan.discriminator.train()
        return metrics

    def _end(self, status: str, reason: str) -> dict[str, Any]:
        """End here, with the worst score; or, in a population, wait to be replaced."""
        self.ended, self.reason = status, reason
        if self.job.replaced and status == "diverged":
            self.run.epochs, self.run.position, self.run.sums = self.run.epochs + 1, 0, {}
        return self.told({}, self.run.epochs)

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """What another trial of a population takes over."""
        torch.save(self.run.state_dict(), Path(checkpoint_dir) / STATE)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Take over a trial's networks, optimisers and place, another's or its own."""
        assert isinstance(checkpoint, str)
        state = torch.load(Path(checkpoint) / STATE, map_location="cpu", weights_only=True)
        self._restore(state)
        name = f"step-{self.run.gan.steps:08d}"
        self.checkpoints.held = {name}  # though its own may be further on
        self._save()
        self.checkpoints.rollback_to(name)
        self.checkpoints.held = set()
        self.cleanup()
        # What it wrote itself beyond that is dropped.
        self.journal = RunLogger(self.folder, self.run, self.job.search)
        self.ended = self.reason = ""

    def cleanup(self) -> None:
        """Close what the last trial has open."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None
