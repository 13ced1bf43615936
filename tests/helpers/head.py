"""The head of a cluster, with one CPU and one GPU that does not exist, and more nodes.

    python head.py [CPUS ...]

starts a node with so many CPUs for each number, prints the address, and stops them at the end of
its input.
"""

import sys
import tempfile

from ray.cluster_utils import Cluster

from cl_ray.training.ray_session import START_ATTEMPTS, START_TIMEOUT

with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
    node = {"num_cpus": 1, "num_gpus": 1, "include_dashboard": False, "temp_dir": folder}
    for attempt in range(START_ATTEMPTS):
        try:
            cluster = Cluster(initialize_head=True, head_node_args=node)
            for cpus in sys.argv[1:]:
                cluster.add_node(num_cpus=int(cpus))
            break
        except Exception as error:  # its processes end with this one
            if attempt + 1 == START_ATTEMPTS or not str(error).startswith(START_TIMEOUT):
                raise
    print(cluster.address, flush=True)
    sys.stdin.read()
    cluster.shutdown()
