"""What all trials have in common: a run folder, a process to come back in, and what they say."""

import json
import traceback
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import ray
import ray.actor
from ray import tune

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.model import TrainedModel
from cl_ray.storage import RunStorage
from cl_ray.training.resources import WorkerResources
from cl_ray.tuning.leaderboard import format_values
from cl_ray.tuning.space import configured
from cl_ray.tuning.study import SearchMetric
from cl_ray.tuning.trial_label import start_trial_label

COLLAPSED = 1e-3
"""Samples that vary less than this share of what real images do are one picture."""
COLLAPSED_AFTER = 100
"""Steps before which they may."""
ERROR = "error.txt"


@dataclass(frozen=True)
class TrialContext:
    """What all trials of a search have in common.

    Args:
        search: The search's name.
        folder: Where the trials' run folders lie.
        base: The config that a trial's values change.
        dataset: What they train on.
        metrics: What is optimised.
        plan: What each worker of a trial asks for.
        replaced: Whether a trial that diverged waits to take over another's weights.
        bell: What rings on Ctrl-C, if anything does.
        signs: Whether each trial is to be found in Ray's dashboard by a sign of its own.
    """

    search: str
    folder: RunStorage
    base: Config
    dataset: Dataset
    metrics: list[SearchMetric]
    plan: WorkerResources
    replaced: bool = False
    bell: "ray.actor.ActorHandle[Any] | None" = None
    signs: bool = False

    def run_folder(self, number: int) -> RunStorage:
        """A trial's run folder."""
        return RunStorage(self.folder.uri, f"{number:04d}")


class SearchTrial(tune.Trainable, ABC):
    """One run after another in the same process; Ray Tune calls it.

    A trial's `config` holds its `point`: its `number` and its `values`. It tells a result after
    every epoch. How it trains is its subclass's: `setup`, `open`, `advance` and `cleanup`.
    """

    job: TrialContext
    run_config: Config
    sign: "ray.actor.ActorHandle[Any] | None" = None

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
        self.ended = self.reason = ""
        place = {"name": self.folder.name, "storage": self.folder.storage}
        self.run_config = configured(self.job.base, self.values).model_copy(update=place)
        words = format_values(self.values)
        self.sign = (
            start_trial_label(self.job.search, self.number, words) if self.job.signs else None
        )
        try:
            self.folder.write("config.yaml", self.run_config.to_yaml().encode())
            found = self.open()
        except Exception:
            self._note_error()
            raise
        values = ", ".join(f"{field}={value}" for field, value in self.values.items())
        self.say(f"{found}: {values}")

    def step(self) -> dict[str, Any]:
        """Train for an epoch and measure it."""
        try:
            result = self.advance()
        except Exception:
            self._note_error()
            raise
        scores = ", ".join(f"{m.name} {result[m.name]:.4g}" for m in self.job.metrics)
        self.say(f"epoch {result['epoch']}: {result['reason'] or scores}; {result['status']}")
        return result

    def say(self, line: str) -> None:
        """Leave a line in the process's log, and in the trial's own."""
        line = f"cl_ray search {self.job.search}, trial {self.number} {line}"
        print(line, flush=True)
        if self.sign:
            self.sign.say.remote(line)

    @abstractmethod
    def open(self) -> str:
        """Get ready to train; says whether it starts or from where it goes on."""

    @abstractmethod
    def advance(self) -> dict[str, Any]:
        """An epoch, or what the last one said; see `told`."""

    def told(self, line: dict[str, Any], epochs: int) -> dict[str, Any]:
        """What Tune and the leaderboard hear: a line of metrics.jsonl, after so many epochs."""
        evaluation = {
            k.removeprefix("evaluation/"): v for k, v in line.items() if k.startswith("evaluation/")
        }
        scores = {m.name: evaluation.get(m.name, m.worst) for m in self.job.metrics}
        first = f"evaluation/{self.job.metrics[0].name}"
        lines = self.lines()
        over = epochs >= self.run_config.epochs
        return {
            **scores,
            "number": self.number,
            "values": self.values,
            "epoch": epochs,
            "metrics": {**evaluation, **{k: v for k, v in line.items() if k[:2] in ("d/", "g/")}},
            "history": {line["epoch"]: line[first] for line in lines if first in line},
            "seconds": sum(line["seconds"] for line in lines),
            "speed": line.get("images_per_second", 0.0),
            "status": self.ended or ("finished" if over else "running"),
            "reason": self.reason,
            "done": over or bool(self.ended and not self.job.replaced),
        }

    def lines(self) -> list[dict[str, Any]]:
        """What metrics.jsonl says of each epoch."""
        text = self.folder.read("metrics.jsonl") or b""
        return [json.loads(line) for line in text.decode().splitlines()]

    def _note_error(self) -> None:
        """Leave the error in the trial's folder, where the leaderboard finds it."""
        self.folder.write(ERROR, traceback.format_exc().encode())
        self.say(f"failed:\n{traceback.format_exc()}")

    def __repr__(self) -> str:
        return f"cl_ray.Trial({self.job.search})" if hasattr(self, "job") else "cl_ray.Trial"


def save_sample_grid(run: TrainedModel, job: TrialContext, epochs: int) -> str | None:
    """A sentence if G makes one picture of all noise, which no epoch more will mend."""
    if run.step < COLLAPSED_AFTER:
        return None
    samples = run.generate(64).astype("float32").var(0).mean()
    some = job.dataset.read("train", job.dataset.pieces("train")[:1]).image[:1000]
    real = some.astype("float32").var(0).mean()
    if samples >= COLLAPSED * real:
        return None
    return (
        f"G makes one picture of all noise after epoch {epochs}: its samples vary "
        f"{samples / real:.1e} as much as real images."
    )
