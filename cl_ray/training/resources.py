"""Whether the workers fit: what the cluster has, and what its autoscaler may add."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import ray

from cl_ray.config import Config
from cl_ray.errors import UserError
from cl_ray.training.async_evaluation import EVALUATION_CPUS
from cl_ray.training.autoscaler import HEAD, Autoscaler, find_autoscaler


@dataclass(frozen=True)
class WorkerResources:
    """What each worker asks for.

    Args:
        cpus: CPUs of a worker.
        gpus: GPUs of a worker.
        threads: CPU threads of a worker.
        waits_for: What is not there yet, and who may add it, in words; None if all is there.
    """

    cpus: float
    gpus: float
    threads: int
    waits_for: str | None


def plan_workers(config: Config, local: bool) -> WorkerResources:
    """Share the cluster out among the workers.

    Args:
        config: Of it the numbers of workers, CPUs and GPUs.
        local: Whether the cluster is this machine's own: then all of it is shared out, GPUs as
            well, but for some CPUs that workers on GPUs leave to evaluations; elsewhere a worker
            has 1 CPU and no GPU unless they are asked for.

    Raises:
        UserError: The least number of workers needs more than the cluster has and may add, or fits
            none of its nodes.
    """
    least, most = config.worker_range
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    live = {k: float(sum(_amount(k, node) for node in nodes)) for k in ("CPU", "GPU")}
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = _share(live["GPU"], most) if local and config.device in ("auto", "cuda") else 0.0
    if config.device == "cuda" and not gpus:
        raise UserError(
            "device 'cuda' is for workers that have a GPU, and these have none: give "
            "--gpus-per-worker, or take device auto or cpu."
        )
    # Workers on a GPU miss few of their CPUs, and an evaluation beside them is done on some.
    beside = gpus and config.evaluation.every and least == most
    left = min(float(EVALUATION_CPUS), live["CPU"] // 4) if beside else 0.0
    cpus = config.cpus_per_worker or (max(1.0, (live["CPU"] - left) // most) if local else 1.0)
    threads = config.threads or max(1, int(cpus))
    holds = partial(workers_per_node, cpus=cpus, gpus=gpus)
    fitting = sum(map(holds, nodes))
    if fitting >= least:
        return WorkerResources(cpus, gpus, threads, None)

    autoscaler = None if local else find_autoscaler()
    need = {"CPU": cpus * least, "GPU": gpus * least}
    most_of = {k: max_capacity(partial(_amount, k), nodes, autoscaler) for k in live}
    for kind, per_worker in (("CPU", cpus), ("GPU", gpus)):
        if need[kind] > most_of[kind]:
            more = most_of[kind] - live[kind]
            may = f" and its autoscaler may add {more:g}" if autoscaler else ""
            fit = int(most_of[kind] // per_worker)
            flag = f"--{kind.lower()}s-per-worker"
            way = f"take --workers {fit}, or a smaller {flag}" if fit else f"take a smaller {flag}"
            raise UserError(
                f"workers {least} with {per_worker:g} {kind} each need {need[kind]:g} {kind}; the "
                f"cluster has {live[kind]:g}{may}: {way}."
            )
    each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
    fits = max_capacity(holds, nodes, autoscaler)
    if fits < least:  # enough in all, but no worker is split over nodes or GPUs
        may = f", with those that its autoscaler may add for {fits:g}" if autoscaler else ""
        way = f"take --workers {fits:g}, or give each less" if fits else "give each less"
        raise UserError(
            f"workers {least} with {each} each do not fit: the cluster's nodes, {len(nodes)} "
            f"of them, have room for {fitting}{may}: {way}."
        )
    missing = " and ".join(f"{need[k] - live[k]:g} {k}" for k in live if need[k] > live[k])
    missing = missing or f"nodes with room for {least - fitting} more workers of {each}"
    if math.isinf(fits):
        source = "from the autoscaler, whose limit is not known here"
        return WorkerResources(cpus, gpus, threads, f"{missing} {source}")
    return WorkerResources(cpus, gpus, threads, f"{missing}, which the autoscaler may add")


def max_capacity(
    worth: Callable[[dict[str, float]], float],
    nodes: list[dict[str, float]],
    autoscaler: Autoscaler | None,
) -> float:
    """What the nodes are worth together, or may be: the head and all that an autoscaler starts.

    Args:
        worth: Of a node's resources.
        nodes: The resources of those that are there.
        autoscaler: The cluster's, if it has one; one that does not say what it may add makes it
            infinite.
    """
    now = sum(map(worth, nodes))
    if autoscaler is None:
        return now
    head: dict[str, float] = next((node for node in nodes if HEAD in node), {})
    return max(now, worth(head) + autoscaler.reach(worth))


def wait_for_resources(plan: WorkerResources, workers: int, say: Callable[[str], None]) -> None:
    """Wait until the cluster has room for so many workers; Ctrl-C ends it.

    The group that is asked for is what the autoscaler sees. Ray Train waits too, but its own
    waiting does not heed Ctrl-C.

    Args:
        plan: What each worker asks for.
        workers: How many.
        say: Told once for what it waits.
    """
    each = {"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})}
    group = ray.util.placement_group([each] * workers)
    try:
        if plan.waits_for or not group.wait(1):
            say(f"Waiting for {plan.waits_for or 'what others use of the cluster'}.")
        while not group.wait(1):
            pass
    finally:
        ray.util.remove_placement_group(group)


def _share(gpus: float, workers: int) -> float:
    """A worker's part of the GPUs: a whole one each if there are enough, else a fraction.

    Of one GPU, that is: 3 workers on 2 GPUs get a half each, as Ray never splits a worker over two.
    Rounded down to Ray's precision, or the last worker would find no room.
    """
    return math.floor(1e4 / math.ceil(workers / gpus)) / 1e4 if gpus else 0.0


def _amount(kind: str, node: dict[str, float]) -> float:
    """How many CPUs or GPUs a node has."""
    return node.get(kind, 0.0)


def workers_per_node(node: dict[str, float], cpus: float, gpus: float) -> int:
    """How many workers a node holds; a fraction of a GPU is one of a single GPU."""
    workers = math.floor(node.get("CPU", 0.0) / cpus + 1e-6)
    if gpus >= 1:
        workers = min(workers, math.floor(node.get("GPU", 0.0) / gpus + 1e-6))
    elif gpus:
        workers = min(workers, int(node.get("GPU", 0.0)) * math.floor(1 / gpus + 1e-6))
    return workers
