"""Resources of workers: what a cluster has and its autoscaler may add, and whether it suffices."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from cl_ray.config import Config
from cl_ray.errors import UserError
from cl_ray.training.ray_compat import HEAD_RESOURCE, autoscaler_settings

EVALUATION_CPUS = 4
"""The most CPUs that an evaluation beside the training takes, of those that are free."""

NodeResources = dict[str, float]
"""The resources of a node by their names in Ray, such as `{"CPU": 8.0, "GPU": 1.0}`."""


@dataclass(frozen=True)
class WorkerResources:
    """What each worker requests.

    Args:
        gpus: A whole number, or a fraction of one GPU.
        waits_for: The resources that are not there yet, and who may add them; None if all are.
    """

    cpus: float
    gpus: float
    threads: int
    waits_for: str | None

    @property
    def bundle(self) -> NodeResources:
        """The request in Ray's form."""
        return {"CPU": self.cpus, **({"GPU": self.gpus} if self.gpus else {})}


@dataclass(frozen=True)
class Shortage:
    """The reason why workers do not fit.

    Args:
        cpus: CPUs of each; `gpus` likewise.
        kind: The resource of which the sum is too small, "CPU" or "GPU"; None if the sums suffice
            and the nodes are too small, as no worker is split over nodes or GPUs.
        available: The amount of `kind` that is there; with None, the number of workers that fit.
        may_add: The amount that an autoscaler may add to `available`; None without an autoscaler.
        fits: The most workers that fit, with all that an autoscaler may add.
        place: Where the resources are looked for.
        batch_size: The batch that workers divide; 0 if nothing is divided.
    """

    workers: int
    cpus: float
    gpus: float
    kind: str | None
    available: float
    may_add: float | None
    fits: int
    nodes: int = 1
    place: str = "the cluster"
    batch_size: int = 0

    @property
    def usable_workers(self) -> int:
        """The most workers that fit and divide the batch, 0 if not even one fits."""
        return next((n for n in range(self.fits, 0, -1) if not self.batch_size % n), 0)


class InsufficientResourcesError(UserError):
    """The requested workers do not fit; the message speaks of the units that the caller names.

    Args:
        request: The request as it was given; None for the workers of a run.
        smaller_request: The flags of a request that fits, such as "--concurrent 2", if any.
        unit: What the flags of CPUs and GPUs are "per".
    """

    def __init__(
        self,
        shortage: Shortage,
        request: str | None = None,
        smaller_request: str | None = None,
        unit: str = "worker",
    ):
        self.shortage = s = shortage
        if request is None:
            request = f"workers {s.workers} with"
            smaller_request = f"--workers {s.usable_workers}" if s.fits else None
        if s.kind:
            per_worker = s.cpus if s.kind == "CPU" else s.gpus
            autoscaler = "" if s.may_add is None else f" and its autoscaler may add {s.may_add:g}"
            found = (
                f"{request} {per_worker:g} {s.kind} each need {per_worker * s.workers:g} {s.kind}; "
                f"{s.place} has {s.available:g}{autoscaler}"
            )
            flag = f"a smaller --{s.kind.lower()}s-per-{unit}"
            hint = f"take {smaller_request}, or {flag}" if smaller_request else f"take {flag}"
        else:
            each = describe_resources(s.cpus, s.gpus)
            autoscaler = ""
            if s.may_add is not None:
                autoscaler = f", with those that its autoscaler may add for {s.fits:g}"
            found = (
                f"{request} {each} each do not fit: {s.place}'s nodes, {s.nodes} of them, have "
                f"room for {s.available:g}{autoscaler}"
            )
            hint = f"take {smaller_request}, or give" if smaller_request else "give"
            hint += " each less"
        super().__init__(f"{found}: {hint}.")


@dataclass(frozen=True)
class Autoscaler:
    """The limits of an autoscaler, the head node left out.

    Args:
        node_types: For each type of node what one has, None if that is known only when one is up,
            and the most nodes of that type.
        max_nodes: The most nodes of all types together.
    """

    node_types: tuple[tuple[NodeResources | None, int], ...]
    max_nodes: int


UNKNOWN_AUTOSCALER = Autoscaler(((None, 1),), 1)
"""An autoscaler whose limits are not known."""


def find_autoscaler() -> Autoscaler | None:
    """The autoscaler of the connected cluster; None if it has none."""
    settings = autoscaler_settings()
    if not settings:
        return None
    try:
        types: dict[str, dict[str, Any]] = settings["available_node_types"]  # type: ignore[index]
        limits = tuple((t.get("resources"), int(t.get("max_workers", 0))) for t in types.values())
        max_nodes = settings.get("max_workers", sum(most for _, most in limits))  # type: ignore[union-attr]
        return Autoscaler(limits, int(max_nodes))
    except (AttributeError, KeyError, TypeError, ValueError):
        return UNKNOWN_AUTOSCALER


def alive_nodes() -> list[dict[str, Any]]:
    """The nodes of the connected cluster that are alive, as `ray.nodes` describes them."""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def live_nodes() -> list[NodeResources]:
    """The resources of each node of the connected cluster."""
    return [node["Resources"] for node in alive_nodes()]


def start_on_node(node: str | None, target: Any, *arguments: Any, **options: Any) -> Any:
    """Start a task or an actor on the node of that id, or on this one, and nowhere else; no CPU.

    Another node may leave the cluster, and an actor with it.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = node or ray.get_runtime_context().get_node_id()
    on_node = NodeAffinitySchedulingStrategy(node, soft=False)
    remote = ray.remote(num_cpus=0, scheduling_strategy=on_node, **options)(target)
    return remote.remote(*arguments)


def max_capacity(
    measure: Callable[[NodeResources], float],
    nodes: list[NodeResources],
    autoscaler: Autoscaler | None,
) -> float:
    """The largest sum of a measure over the nodes that are there or that an autoscaler may add.

    It is infinite if the autoscaler's limits are unknown.
    """
    now = sum(map(measure, nodes))
    workers = sum(HEAD_RESOURCE not in node for node in nodes)
    if autoscaler is None or (autoscaler != UNKNOWN_AUTOSCALER and workers >= autoscaler.max_nodes):
        return now
    values = [(measure(n) if n else math.inf, most) for n, most in autoscaler.node_types]
    added, left = 0.0, autoscaler.max_nodes
    for value, most in sorted(values, reverse=True):
        count = min(most, left)
        added += count * value if count else 0
        left -= count
    head: NodeResources = next((node for node in nodes if HEAD_RESOURCE in node), {})
    return max(now, measure(head) + added)


def workers_per_node(node: NodeResources, cpus: float, gpus: float) -> int:
    """The number of workers that fit on a node; a fraction of a GPU is one of a single GPU."""
    workers = math.floor(node.get("CPU", 0.0) / cpus + 1e-6)
    if gpus >= 1:
        workers = min(workers, math.floor(node.get("GPU", 0.0) / gpus + 1e-6))
    elif gpus:
        workers = min(workers, int(node.get("GPU", 0.0)) * math.floor(1 / gpus + 1e-6))
    return workers


def describe_resources(cpus: float, gpus: float) -> str:
    """1 CPU and 0.5 GPU."""
    return f"{cpus:g} CPU" + (f" and {gpus:g} GPU" if gpus else "")


def plan_workers(config: Config, local: bool) -> WorkerResources:
    """Choose each worker's resources, and check that the workers fit the connected cluster.

    Args:
        config: Of it the numbers of workers, CPUs and GPUs.
        local: Whether Ray was started on this machine for this process. Then the workers share all
            its CPUs and GPUs, except for CPUs that workers on GPUs leave to evaluations. On a
            cluster a worker has 1 CPU and no GPU unless the config requests them.

    Raises:
        InsufficientResourcesError: The least number of workers does not fit, also with all that an
            autoscaler may add.
        UserError: The device needs a GPU and the workers have none.
    """
    least, most = config.worker_range
    nodes = live_nodes()
    live = {kind: sum(_amount(kind, node) for node in nodes) for kind in ("CPU", "GPU")}
    gpus = config.gpus_per_worker
    if gpus is None:
        share_gpus = local and config.device in ("auto", "cuda")
        gpus = _gpus_per_worker(live["GPU"], most) if share_gpus else 0.0
    if config.device == "cuda" and not gpus:
        raise UserError(
            "device 'cuda' is for workers that have a GPU, and these have none: give "
            "--gpus-per-worker, or take device auto or cpu."
        )
    # Workers on a GPU need few CPUs, and an evaluation beside them uses some.
    evaluates_beside = gpus and config.evaluation.every and least == most
    reserved = min(float(EVALUATION_CPUS), live["CPU"] // 4) if evaluates_beside else 0.0
    all_cpus = max(1.0, (live["CPU"] - reserved) // most)
    cpus = config.cpus_per_worker or (all_cpus if local else 1.0)
    threads = config.threads or max(1, int(cpus))
    workers_on = partial(workers_per_node, cpus=cpus, gpus=gpus)
    fitting = sum(map(workers_on, nodes))
    if fitting >= least:
        return WorkerResources(cpus, gpus, threads, None)

    autoscaler = None if local else find_autoscaler()
    measures: list[tuple[str | None, Callable[[NodeResources], float], float]] = [
        ("CPU", partial(_amount, "CPU"), cpus),
        ("GPU", partial(_amount, "GPU"), gpus),
        (None, workers_on, 1),
    ]
    lacks = []
    for kind, measure, per_worker in measures:
        available, needed = sum(map(measure, nodes)), per_worker * least
        maximum = max_capacity(measure, nodes, autoscaler)
        if needed > maximum:
            may_add, fits = maximum - available if autoscaler else None, int(maximum // per_worker)
            raise InsufficientResourcesError(
                Shortage(
                    least, cpus, gpus, kind, available, may_add, fits, len(nodes),
                    batch_size=config.batch_size,
                )
            )  # fmt: skip
        if kind and needed > available:
            lacks.append(f"{needed - available:g} {kind}")
    each = describe_resources(cpus, gpus)
    missing = " and ".join(lacks) or f"nodes with room for {least - fitting} more workers of {each}"
    if math.isinf(maximum):
        missing += " from the autoscaler, whose limit is not known here"
    else:
        missing += ", which the autoscaler may add"
    return WorkerResources(cpus, gpus, threads, missing)


def wait_for_resources(
    resources: WorkerResources, workers: int, report: Callable[[str], None]
) -> None:
    """Wait until the cluster has the workers' resources free; Ctrl-C interrupts it.

    The placement group that this creates is what the autoscaler sees. Ray Train waits too, but
    Ctrl-C does not interrupt that. `report` is called with what it waits for, if it does.
    """
    import ray

    group = ray.util.placement_group([resources.bundle] * workers)
    try:
        if resources.waits_for or not group.wait(1):
            report(f"Waiting for {resources.waits_for or 'resources that other jobs use'}.")
        while not group.wait(1):
            pass
    finally:
        ray.util.remove_placement_group(group)


def _gpus_per_worker(gpus: float, workers: int) -> float:
    """A worker's fraction of the GPUs: a whole one each if there are enough.

    Of 2 GPUs 3 workers get a half each, as Ray never splits a worker over two. Rounded down to
    Ray's precision, or the last worker would not fit.
    """
    return math.floor(1e4 / math.ceil(workers / gpus)) / 1e4 if gpus else 0.0


def _amount(kind: str, node: NodeResources) -> float:
    return node.get(kind, 0.0)
