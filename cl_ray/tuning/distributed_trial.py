"""A trial of several workers: a TorchTrainer, which is let through one epoch after another.

Ray Tune ends a trial by ending its process, and what a trainer in it had placed is then released
only through the dashboard's state API: with no dashboard, or another Ray cluster on the machine,
the search would wait for ever (ray#54305 is related). So no trainer is ever ended: its workers
ask at a gate before each epoch, and one that is stopped early comes to its own end there. What
is left by a trial whose process is killed is seen to by `tuning/reservations.py`.
"""

import threading
import time
from typing import Any

import ray

from cl_ray.checkpoint import CheckpointStore
from cl_ray.errors import UserError
from cl_ray.model import load
from cl_ray.training.torch_trainer import build_torch_trainer, start_progress_actor
from cl_ray.tuning.stop_signal import StopListener
from cl_ray.tuning.trial import SearchTrial, TrialContext, save_sample_grid

POLL = 0.1
"""Seconds between two looks at where the workers are."""
LONGEST_END = 300.0
"""Seconds that workers may take to come to the gate after a trial has ended."""
MAX_FAILURES = 3
"""Times that workers that died are started again within an attempt at a trial."""


class DistributedTrial(SearchTrial):
    """Trains by a TorchTrainer; this process only says how far it may go."""

    trainer: threading.Thread | None = None

    def setup(self, config: dict[str, Any], job: TrialContext) -> None:
        """Begin the first."""
        self.job, self.listener = job, StopListener(job.bell)
        self.begin(config)

    def open(self) -> str:
        """Start the workers; they wait at the gate."""
        newest = CheckpointStore(*self.folder.open()).newest()
        self.epochs = newest.epoch if newest else 0
        self.board, self.losses = start_progress_actor(self.folder), 0
        self.outcome: dict[str, Any] | None = None
        self.error: BaseException | None = None
        self.trainer = threading.Thread(target=self._fit, daemon=True)
        self.trainer.start()
        return "goes on from " + newest.name if newest else "starts"

    def advance(self) -> dict[str, Any]:
        """Let the workers through one epoch, and read what they wrote down of it."""
        assert self.trainer is not None
        due = min(self.epochs + 1, self.run_config.epochs)
        while self.trainer.is_alive() and ray.get(self.board.reached.remote()) < 0:
            time.sleep(POLL)  # until the workers are there: no steps to save before
        with self.listener.steps(self.number):
            ray.get(self.board.allow.remote(due))
            while self.trainer.is_alive() and ray.get(self.board.reached.remote()) < due:
                if self.listener.hears() and ray.get(self.board.save.remote()):
                    self.listener.wait_for_the_end(self.number)
                time.sleep(POLL)
        if not self.trainer.is_alive():
            self._see_how_it_ended()
        if not self.ended:
            line = next((line for line in self.lines() if line["epoch"] == due), {})
            self.epochs = due
            measured = any(key.startswith("evaluation/") for key in line)
            picture = save_sample_grid(load(self.folder.uri, device="cpu"), self.job, due)
            if measured and not picture:
                return {**self.told(line, due), "lost": self._lost()}
            notes = ray.get(self.board.look.remote(0))[1]
            self.ended, self.reason = "collapsed", picture or (notes or ["no metrics"])[-1]
        return {**self.told({}, self.epochs), "lost": self._lost()}

    def _lost(self) -> list[str]:
        """Why workers were lost since this was last asked."""
        new: list[str] = ray.get(self.board.losses.remote(self.losses))
        self.losses += len(new)
        return new

    def _fit(self) -> None:
        try:
            trainer = build_torch_trainer(
                self.run_config,
                self.folder,
                self.job.dataset,
                self.job.plan,
                self.board,
                MAX_FAILURES,
                search=self.job.search,
            )
            self.outcome = trainer.fit().return_value
        except BaseException as error:  # told where the trial is asked for its result
            self.error = error

    def _see_how_it_ended(self) -> None:
        """Take note of a loss that became no number.

        Raises:
            UserError: The workers failed, in their own words where they left any.
        """
        if self.error is not None:
            reason = ray.get(self.board.fatal.remote())
            raise UserError(reason or " ".join(str(self.error).split())[-500:]) from self.error
        outcome = self.outcome or {"status": "stopped", "reason": "the workers were stopped"}
        if outcome["status"] == "diverged":
            self.ended, self.reason = "diverged", outcome["reason"]
        elif outcome["status"] == "stopped":
            raise UserError(outcome["reason"])

    def cleanup(self) -> None:
        """Have the workers come to their end, and wait for it."""
        if self.trainer is not None:
            ray.get(self.board.end.remote())
            self.trainer.join(timeout=LONGEST_END)
            self.trainer = None
