"""A trial of one worker: trained and measured in the trial's own process."""

import time
from pathlib import Path
from typing import Any

import torch

from cl_ray.checkpoint import Checkpoints
from cl_ray.config import Config, leaves
from cl_ray.data.dataset import Rows
from cl_ray.data.shards import ResidentShard, StreamingShard
from cl_ray.data.share import Share
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.loading import LoadedRun
from cl_ray.run import Diverged, Figures, Record, Run
from cl_ray.training.cores import Cores
from cl_ray.training.device import keep_freed_memory, resolve
from cl_ray.training.journal import Journal
from tuning.bell import Listener
from tuning.trial import Job, Trial, one_picture

LONGEST_WAIT = 30.0
"""Seconds between two words of a trial that waits to be replaced."""
STATE = "state.pt"


class OneWorkerTrial(Trial):
    """Trains in its own process, which the next trial takes over, data and evaluator with it."""

    def setup(
        self, config: dict[str, Any], job: Job, rows: Rows | None, evaluator: Evaluator
    ) -> None:
        """Take what all trials share out of the object store, and begin the first."""
        self.cores = Cores(job.plan.threads)
        keep_freed_memory()
        self.rows, self.evaluator = rows, evaluator
        self.journal: Journal | None = None
        self.pace = 1.0
        self.job, self.listener = job, Listener(job.bell)
        self.begin(config)

    def open(self) -> str:
        """Set the run up, or load its newest checkpoint."""
        self.run = self._run()
        self.checkpoints = Checkpoints(*self.folder.open(), keep=1)
        newest = self.checkpoints.newest()
        if newest:
            self._restore(self.checkpoints.load(newest.name))
        self.journal = Journal(self.folder, self.run, self.job.search)
        return "goes on from " + newest.name if newest else "starts"

    def _run(self) -> Run:
        """A run at its start."""
        device, dtype = resolve(self.run_config, self.job.plan.gpus)
        share = Share(self.job.dataset, self.run_config)
        shard = (
            ResidentShard(share, self.rows, device)
            if self.rows is not None
            else StreamingShard.read(share, device)
        )
        return Run(self.run_config, shard, device, dtype)

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
                    figures = run.epoch(self.watch)
                except Diverged as error:
                    return self._end("diverged", str(error))
                self.pace = min(figures["seconds"], LONGEST_WAIT)
                journal.epoch(figures)
                self._save()
        try:
            figures = self._evaluate()
        except UserError as error:
            return self._end("collapsed", str(error))
        journal.evaluated(run.epochs, run.adversary.steps, figures)
        return self.told(self.lines()[-1], run.epochs)

    def watch(self, record: Record) -> None:
        """Curves, and a checkpoint if one is due within the epoch, or the search is to end."""
        assert self.journal is not None
        self.journal.record(record)
        if record.position == self.run.shard.share.steps:
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
        self.checkpoints.save(
            run.state_dict(), epoch=run.epochs, step=run.adversary.steps, figure=None
        )

    def _evaluate(self) -> Figures:
        adversary = self.run.adversary
        loaded = LoadedRun(
            config=self.run.config,
            shape=adversary.shape,
            checkpoint=f"step-{adversary.steps:08d}",
            step=adversary.steps,
            generator=adversary.averaged,
            discriminator=adversary.discriminator,
            device=adversary.device,
            classes=adversary.classes,
            counts=tuple(self.run.shard.share.counts),
            prior=self.run.prior,
        )
        collapsed = one_picture(loaded, self.job, self.run.epochs)
        if collapsed:
            raise UserError(collapsed)
        adversary.discriminator.eval()  # the training must not notice
        figures = self.evaluator.evaluate(loaded).figures()
        adversary.discriminator.train()
        return figures

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
        name = f"step-{self.run.adversary.steps:08d}"
        self.checkpoints.held = {name}  # though its own may be further on
        self._save()
        self.checkpoints.return_to(name)
        self.checkpoints.held = set()
        self.cleanup()
        # What it wrote itself beyond that is dropped.
        self.journal = Journal(self.folder, self.run, self.job.search)
        self.ended = self.reason = ""

    def cleanup(self) -> None:
        """Close what the last trial has open."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None
