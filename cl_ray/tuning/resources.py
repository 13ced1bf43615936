"""How the cluster is shared out among the trials."""

import math
import re
from dataclasses import dataclass
from functools import partial

import ray

from cl_ray.errors import UserError
from cl_ray.training.autoscaler import find_autoscaler
from cl_ray.training.resources import WorkerResources, max_capacity, plan_workers, workers_per_node
from cl_ray.tuning.options import Options
from cl_ray.tuning.prepare import Search


@dataclass(frozen=True)
class TrialResources:
    """How the cluster is shared out.

    Args:
        concurrent: Trials at once.
        workers: Workers of each.
        plan: What each worker asks for.
        more: Whether an autoscaler may add room for more trials, and does not say for how many.
    """

    concurrent: int
    workers: int
    plan: WorkerResources
    more: bool = False

    def __str__(self) -> str:
        gpus = f" and {self.plan.gpus:g} GPU" if self.plan.gpus else ""
        many = "trials at once" if self.concurrent > 1 else "trial at a time"
        wide = f"of {self.workers} workers, " if self.workers > 1 else ""
        more = "; --concurrent asks the autoscaler for room for more" if self.more else ""
        return f"{self.concurrent} {many}, {wide}{self.plan.cpus:g} CPU{gpus} each{more}"


def allocate_trials(search: Search, local: bool) -> TrialResources:
    """How many trials run at once, from what the cluster has and its autoscaler may add.

    Raises:
        UserError: So many can never run at once, or not even one.
    """
    options, wide = search.options, search.options.workers
    concurrent, more = options.concurrent, False
    if concurrent is None:
        gpus = _plan(search, 1, local).gpus
        cpus = _each(options.cpus_per_trial, wide) or 1.0
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        holds = partial(workers_per_node, cpus=cpus, gpus=gpus)
        fit = max_capacity(holds, nodes, None if local else find_autoscaler())
        unknown = math.isinf(fit)
        fit = sum(map(holds, nodes)) if unknown else fit
        concurrent = max(1, min(int(fit) // wide, search.wanted))
        more = unknown and concurrent < search.wanted
    return TrialResources(concurrent, wide, _plan(search, concurrent, local), more)


def _plan(search: Search, concurrent: int, local: bool) -> WorkerResources:
    """What each worker asks for, of so many trials at once."""
    options, wide = search.options, search.options.workers
    asked = {
        "workers": concurrent * wide,
        "cpus_per_worker": _each(options.cpus_per_trial, wide),
        "gpus_per_worker": _each(options.gpus_per_trial, wide),
        "threads": None,
        # A trial is measured between its epochs: no CPU is left to evaluations beside.
        "evaluation": search.base.evaluation.model_copy(update={"every": 0}),
    }
    try:
        return plan_workers(search.base.model_copy(update=asked), local)
    except UserError as error:
        raise UserError(_of_trials(str(error), options, concurrent)) from error


def _each(of_a_trial: float | None, workers: int) -> float | None:
    """A worker's part of a trial's CPUs or GPUs, rounded down to Ray's precision."""
    return None if of_a_trial is None else math.floor(1e4 * of_a_trial / workers + 1e-6) / 1e4


def _of_trials(error: str, options: Options, concurrent: int) -> str:
    """What cannot be had for so many workers, said of the trials that they are of."""
    wide = options.workers

    def way_out(found: re.Match[str]) -> str:
        fit, otherwise = int(found[1]), found[2]
        if fit >= wide:
            return f"take --concurrent {fit // wide}, or {otherwise}"
        if options.cpus_per_trial or options.gpus_per_trial:  # fewer workers would share as much
            return otherwise if otherwise == "give" else f"take {otherwise}"
        one = "--concurrent 1 with " if concurrent > 1 else ""
        return f"take {one}--workers {fit}, or {otherwise}"

    error = re.sub(r"take --workers (\d+), or (a|give)", way_out, error)
    error = error.replace("-per-worker", "-per-trial")
    of_workers = f" {wide} workers of" if wide > 1 else ""
    return error.replace(
        f"workers {concurrent * wide} with", f"concurrent {concurrent} with{of_workers}"
    )
