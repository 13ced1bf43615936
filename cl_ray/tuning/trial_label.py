"""A trial's name in Ray's dashboard.

Ray settles an actor's class, name and repr when it makes the actor, and here one actor runs one
trial after another. So each trial puts up a sign: an actor that computes nothing, is called by the
search, the trial and its values, and lives as long as the trial. What the trial says is in the
sign's log, and in a file of the same name on the dashboard's Logs page.
"""

import re
from pathlib import Path
from typing import Any

import ray
import ray.actor
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

LONGEST = 200
"""Characters of a file's name; file systems take 255 bytes."""


class TrialLabel:
    """Stands for a trial; a Ray actor, whose module imports nothing that is slow.

    Args:
        title: What it is called: the search, the trial's number and its values.
    """

    def __init__(self, title: str):
        self.title = title
        node = ray._private.worker._global_node
        plain = re.sub(r"[^\w.=+-]+", "_", title)[:LONGEST]
        self.file = Path(node.get_logs_dir_path(), f"trial-{plain}.log") if node else None

    def __repr__(self) -> str:
        return self.title

    def say(self, line: str) -> None:
        """Print a line into both logs."""
        print(line, flush=True)
        if self.file:
            with self.file.open("a") as log:
                log.write(f"{line}\n")


def start_trial_label(search: str, number: int, values: str) -> "ray.actor.ActorHandle[Any]":
    """A trial's sign, on the trial's node; it is taken down when nobody holds it any more."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    own = type(f"Trial_{search}_{number:04d}", (TrialLabel,), {})
    kind = ray.remote(num_cpus=0, scheduling_strategy=here)(own)
    return kind.remote(f"{search} {number:04d}: {values}")
