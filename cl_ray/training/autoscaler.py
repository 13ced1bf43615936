"""What a cluster's autoscaler may add. Ray 2.60 says it to nobody, so its head is asked."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

HEAD = "node:__internal_head__"
"""The resource that marks the head among the nodes."""


@dataclass(frozen=True)
class NodeType:
    """Nodes of one kind that an autoscaler may start.

    Args:
        resources: What one has; None where that is known only when one is up.
        most: How many of them there may be.
    """

    resources: dict[str, float] | None
    most: int


@dataclass(frozen=True)
class Autoscaler:
    """What an autoscaler may bring the cluster to, its head aside.

    Args:
        types: The kinds of nodes.
        most: How many nodes there may be, of all kinds together.
    """

    types: tuple[NodeType, ...]
    most: int

    def reach(self, worth: Callable[[dict[str, float]], float]) -> float:
        """The most that its nodes may be worth together; infinite where that is unknown.

        Args:
            worth: Of a node's resources.
        """
        each = [(worth(t.resources) if t.resources else math.inf, t.most) for t in self.types]
        total, left = 0.0, self.most
        for value, most in sorted(each, reverse=True):
            count = min(most, left)
            total += count * value if count else 0
            left -= count
        return total


UNKNOWN = Autoscaler((NodeType(None, 1),), 1)
"""An autoscaler that is there and does not say what it may add."""


def find_autoscaler() -> Autoscaler | None:
    """The autoscaler that serves this cluster; None where none does.

    It is the head's process `monitor.py`, and what it may add stands in the file that it was
    started with: under `ray up`, ray_bootstrap_config.yaml. Without a file that process only
    watches. KubeRay runs its autoscaler in a container of its own, and has the head start no such
    process: there the status that every autoscaler leaves with Ray tells that it lives, and what
    it may add is unknown.
    """

    def look() -> tuple[list[tuple[dict[str, float] | None, int]], int] | bool:
        """On the head: kinds of nodes and the most nodes, or whether there is an autoscaler."""
        import json
        import time
        from pathlib import Path

        import psutil
        import yaml
        from ray.autoscaler.v2.sdk import get_cluster_status
        from ray.experimental.internal_kv import _internal_kv_get

        gcs = ray.get_runtime_context().gcs_address
        flag = "--autoscaling-config="
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            ours = f"--gcs-address={gcs}" in words
            if not ours or not any(Path(word).name == "monitor.py" for word in words):
                continue
            files = [word.removeprefix(flag) for word in words if word.startswith(flag)]
            if not files:
                return False
            try:
                config = yaml.safe_load(Path(files[0]).expanduser().read_text())
                types = config["available_node_types"].values()
                found = [(t.get("resources"), int(t.get("max_workers", 0))) for t in types]
                return found, int(config.get("max_workers", sum(most for _, most in found)))
            except (OSError, yaml.YAMLError, AttributeError, KeyError, TypeError):
                return True
        # Autoscalers of version 1 write the time, those of version 2 count their reports.
        status = json.loads(_internal_kv_get("__autoscaling_status") or "{}")
        if time.time() - status.get("time", 0) < 60:
            return True
        return get_cluster_status(gcs).stats.autoscaler_version != "0"

    alive = [node for node in ray.nodes() if node["Alive"]]
    head = next(node["NodeID"] for node in alive if HEAD in node["Resources"])
    there = NodeAffinitySchedulingStrategy(head, soft=False)
    found = ray.get(ray.remote(num_cpus=0)(look).options(scheduling_strategy=there).remote())
    if isinstance(found, bool):
        return UNKNOWN if found else None
    types, most = found
    return Autoscaler(tuple(NodeType(*each) for each in types), most)
