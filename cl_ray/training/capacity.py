"""Whether the workers fit: what the cluster has, and what its autoscaler may add."""

import math
from dataclasses import dataclass

import ray

from cl_ray.config import Config
from cl_ray.errors import UserError


@dataclass(frozen=True)
class Plan:
    """What each worker asks for.

    Args:
        cpus: CPUs of a worker.
        gpus: GPUs of a worker.
        threads: CPU threads of a worker.
        waits_for: What is not there yet but may be added, in words; None if all is there.
    """

    cpus: float
    gpus: float
    threads: int
    waits_for: str | None


def plan(config: Config, local: bool) -> Plan:
    """Share the cluster out among the workers.

    Args:
        config: Of it the numbers of workers, CPUs and GPUs.
        local: Whether the cluster is this machine's own: then all of it is shared out, GPUs as
            well; elsewhere a worker has 1 CPU and no GPU unless they are asked for.

    Raises:
        UserError: The least number of workers needs more than the cluster has and may add, or fits
            none of its nodes.
    """
    least, most = config.worker_range
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    live = {k: float(sum(node.get(k, 0.0) for node in nodes)) for k in ("CPU", "GPU")}
    ceiling = autoscaler_ceiling()
    able = {k: max(live[k], ceiling.get(k, 0.0)) for k in live}
    gpus = config.gpus_per_worker
    if gpus is None:
        gpus = _share(live["GPU"], most) if local and config.device in ("auto", "cuda") else 0.0
    cpus = config.cpus_per_worker or (max(1.0, live["CPU"] // most) if local else 1.0)
    need = {"CPU": cpus * least, "GPU": gpus * least}
    for kind, per_worker in (("CPU", cpus), ("GPU", gpus)):
        if need[kind] > able[kind]:
            may = f" and its autoscaler may add up to {ceiling[kind]:g}" if kind in ceiling else ""
            fit = int(able[kind] // per_worker)
            flag = f"--{kind.lower()}s-per-worker"
            way = f"take --workers {fit}, or a smaller {flag}" if fit else f"take a smaller {flag}"
            raise UserError(
                f"workers {least} with {per_worker:g} {kind} each need {need[kind]:g} {kind}; the "
                f"cluster has {live[kind]:g}{may}: {way}."
            )
    missing = [f"{need[k] - live[k]:g} {k}" for k in live if need[k] > live[k]]
    room = sum(_room(node, cpus, gpus) for node in nodes)
    if room < least and not missing:  # enough in all, but no worker is split over nodes or GPUs
        each = f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")
        if able == live:
            way = f"take --workers {room}, or give each less" if room else "give each less"
            raise UserError(
                f"workers {least} with {each} each do not fit: the cluster's nodes, {len(nodes)} "
                f"of them, have room for {room}: {way}."
            )
        missing = [f"nodes with room for {least - room} more workers of {each}"]
    threads = config.threads or max(1, int(cpus))
    return Plan(cpus, gpus, threads, " and ".join(missing) or None)


def _share(gpus: float, workers: int) -> float:
    """A worker's part of the GPUs: a whole one each if there are enough, else a fraction.

    Of one GPU, that is: 3 workers on 2 GPUs get a half each, as Ray never splits a worker over two.
    Rounded down to Ray's precision, or the last worker would find no room.
    """
    return math.floor(1e4 / math.ceil(workers / gpus)) / 1e4 if gpus else 0.0


def _room(node: dict[str, float], cpus: float, gpus: float) -> int:
    """How many workers a node holds; a fraction of a GPU is one of a single GPU."""
    room = math.floor(node.get("CPU", 0.0) / cpus + 1e-6)
    if gpus >= 1:
        room = min(room, math.floor(node.get("GPU", 0.0) / gpus + 1e-6))
    elif gpus:
        room = min(room, int(node.get("GPU", 0.0)) * math.floor(1 / gpus + 1e-6))
    return room


def autoscaler_ceiling() -> dict[str, float]:
    """The most the autoscaler may bring the cluster to; empty where there is none."""
    from ray._private.state import state  # the only place that Ray 2.60 says it

    most = state.get_max_resources_from_cluster_config()
    return {k: float(v) for k, v in (most or {}).items() if k in ("CPU", "GPU")}
