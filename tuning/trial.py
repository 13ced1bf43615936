"""A trial: one run, trained and measured in a process that the next trial takes over."""

import json
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from cl_ray.checkpoint import Checkpoints
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset, Rows
from cl_ray.data.shards import ResidentShard, StreamingShard
from cl_ray.data.share import Share
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.loading import LoadedRun
from cl_ray.run import Diverged, Figures, Record, Run
from cl_ray.training.device import keep_freed_memory, resolve
from cl_ray.training.folder import Folder
from cl_ray.training.journal import Journal
from tuning.space import configured
from tuning.study import Metric

COLLAPSED = 1e-3
"""Samples that vary less than this share of what real images do are one picture."""
COLLAPSED_AFTER = 100
"""Steps before which they may."""
LONGEST_WAIT = 30.0
"""Seconds between two words of a trial that waits to be replaced."""
STATE = "state.pt"
ERROR = "error.txt"


@dataclass(frozen=True)
class Job:
    """What all trials of a search have in common.

    Args:
        search: The search's name.
        folder: Where the trials' run folders lie.
        base: The config that a trial's values change.
        dataset: What they train on.
        metrics: What is optimised.
        threads: CPU threads of a trial.
        replaced: Whether a trial that diverged waits to take over another's weights.
    """

    search: str
    folder: Folder
    base: Config
    dataset: Dataset
    metrics: list[Metric]
    threads: int
    replaced: bool = False

    def run_folder(self, number: int) -> Folder:
        """A trial's run folder."""
        return Folder(self.folder.uri, f"{number:04d}")


class Training(tune.Trainable):
    """Trains one run after another in the same process; Ray Tune calls it.

    A trial's `config` holds its `point`: its `number` and its `values`. It tells a result after
    every epoch.
    """

    def setup(
        self, config: dict[str, Any], job: Job, rows: Rows | None, evaluator: Evaluator
    ) -> None:
        """Take what all trials share out of the object store, and begin the first."""
        torch.set_num_threads(job.threads)
        keep_freed_memory()
        self.job, self.rows, self.evaluator = job, rows, evaluator
        self.journal: Journal | None = None
        self.pace = 1.0
        self.begin(config)

    def reset_config(self, new_config: dict[str, Any]) -> bool:
        """Begin another trial, or the same one with another's values."""
        self.begin(new_config)
        return True

    def begin(self, config: dict[str, Any]) -> None:
        """Set a trial up, or go on with it from its newest checkpoint."""
        self.cleanup()
        point = config["point"]
        self.number, self.values = point["number"], point["values"]
        self.folder = self.job.run_folder(self.number)
        self.ended = ""
        self.reason = ""
        try:
            self._begin()
        except Exception:
            self._note_error()
            raise

    def _begin(self) -> None:
        place = {"name": self.folder.name, "storage": self.folder.storage}
        config = configured(self.job.base, self.values).model_copy(update=place)
        device, dtype = resolve(config)
        share = Share(self.job.dataset, config)
        shard = (
            ResidentShard(share, self.rows, device)
            if self.rows is not None
            else StreamingShard.read(share, device)
        )
        self.run = Run(config, shard, device, dtype)
        self.checkpoints = Checkpoints(*self.folder.open(), keep=1)
        newest = self.checkpoints.newest()
        if newest:
            self.run.load_state_dict(self.checkpoints.load(newest.name))
        self.folder.write("config.yaml", config.to_yaml().encode())
        self.journal = Journal(self.folder, self.run)
        found = "goes on from " + newest.name if newest else "starts"
        values = ", ".join(f"{field}={value}" for field, value in self.values.items())
        print(f"cl_ray search {self.job.search}, trial {self.number} {found}: {values}", flush=True)

    def step(self) -> dict[str, Any]:
        """Train for an epoch and measure it."""
        try:
            return self._step()
        except Exception:
            self._note_error()
            raise

    def _step(self) -> dict[str, Any]:
        assert self.journal is not None
        run, journal = self.run, self.journal
        if self.ended:  # of a population: waits about an epoch to take over another's weights
            time.sleep(self.pace)
            run.epochs += 1
            return self._result({})
        measured = bool(run.epochs) and not journal.lacks_evaluation(run.epochs)
        if run.epochs >= run.config.epochs and not run.position and measured:
            return self._result(self._last())  # its end was not heard of before
        if run.position or not run.epochs or measured:
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
        return self._result(self._last())

    def watch(self, record: Record) -> None:
        """Curves, and a checkpoint if one is due within the epoch."""
        assert self.journal is not None
        self.journal.record(record)
        every = self.run.config.checkpoint.every
        if every and record.step % every == 0 and record.position < self.run.shard.share.steps:
            self._save()

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
        )
        if adversary.steps >= COLLAPSED_AFTER:
            samples = loaded.generate(64).astype("float32").var(0).mean()
            real = self.evaluator.images()[1].image[:1000].astype("float32").var(0).mean()
            if samples < COLLAPSED * real:
                raise UserError(
                    f"G makes one picture of all noise after epoch {self.run.epochs}: its samples "
                    f"vary {samples / real:.1e} as much as real images."
                )
        return self.evaluator.evaluate(loaded).figures()

    def _last(self) -> dict[str, Any]:
        """The last epoch's line of metrics.jsonl."""
        return self._lines()[-1]

    def _lines(self) -> list[dict[str, Any]]:
        assert self.journal is not None
        return [json.loads(line) for line in self.journal.metrics.read_text().splitlines()]

    def _result(self, line: dict[str, Any]) -> dict[str, Any]:
        """What Tune and the leaderboard hear."""
        evaluation = {
            k.removeprefix("evaluation/"): v for k, v in line.items() if k.startswith("evaluation/")
        }
        scores = {m.name: evaluation.get(m.name, m.worst) for m in self.job.metrics}
        over = self.run.epochs >= self.run.config.epochs
        return {
            **scores,
            "number": self.number,
            "values": self.values,
            "epoch": self.run.epochs,
            "figures": {**evaluation, **{k: v for k, v in line.items() if k[:2] in ("d/", "g/")}},
            "seconds": sum(line["seconds"] for line in self._lines()),
            "speed": line.get("images_per_second", 0.0),
            "status": self.ended or ("finished" if over else "running"),
            "reason": self.reason,
            "done": over or bool(self.ended and not self.job.replaced),
        }

    def _end(self, status: str, reason: str) -> dict[str, Any]:
        """End here, with the worst score; or, in a population, wait to be replaced."""
        self.ended, self.reason = status, reason
        if self.job.replaced and status == "diverged":
            self.run.epochs, self.run.position, self.run.sums = self.run.epochs + 1, 0, {}
        return self._result({})

    def save_checkpoint(self, checkpoint_dir: str) -> None:
        """What another trial of a population takes over."""
        torch.save(self.run.state_dict(), Path(checkpoint_dir) / STATE)

    def load_checkpoint(self, checkpoint: str | dict[str, Any] | None) -> None:
        """Take over a trial's networks, optimisers and place, another's or its own."""
        assert isinstance(checkpoint, str)
        state = torch.load(Path(checkpoint) / STATE, map_location="cpu", weights_only=True)
        self.run.load_state_dict(state)
        name = f"step-{self.run.adversary.steps:08d}"
        self.checkpoints.held = {name}  # though its own may be further on
        self._save()
        self.checkpoints.return_to(name)
        self.checkpoints.held = set()
        self.cleanup()
        self.journal = Journal(self.folder, self.run)  # as far as it goes along with that
        self.ended = self.reason = ""

    def cleanup(self) -> None:
        """Close what the last trial has open."""
        if self.journal is not None:
            self.journal.close()
            self.journal = None

    def _note_error(self) -> None:
        """Leave the error in the trial's folder, where the leaderboard finds it."""
        self.folder.write(ERROR, traceback.format_exc().encode())

    def __repr__(self) -> str:
        return f"cl_ray.Trial({self.job.search})" if hasattr(self, "job") else "cl_ray.Trial"
