"""The head of a cluster, with one CPU and one GPU that does not exist, and more nodes.

    python head.py [CPUS ...]

starts a node with so many CPUs for each number, prints the address, and stops them at the end of
its input.
"""

import os
import sys
import tempfile
from pathlib import Path

from ray.cluster_utils import Cluster

from helpers.node_start import start_again_if_slow


def start() -> Cluster:
    node = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=node)
    for cpus in sys.argv[1:]:
        cluster.add_node(num_cpus=int(cpus))
    return cluster


with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
    os.environ["RAY_TMPDIR"] = folder  # Ray also writes the address there
    (Path(folder) / "ray").mkdir()
    cluster = start_again_if_slow(start)
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
