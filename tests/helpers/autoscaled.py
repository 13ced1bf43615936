"""The head of a cluster whose nodes an autoscaler starts, all as processes on this machine.

Ray's own AutoscalingCluster stops every Ray of the machine and uses the default ports. This uses
its node provider, with an autoscaler as `ray up` or KubeRay starts it.

    python autoscaled.py VERSION CONFIG

prints the address, then reads commands from standard input: `external` starts the autoscaler in a
process of its own with its config in memory, as KubeRay does; `end` stops that one; `bootstrap`
lets the head start the autoscaler with a config file, as `ray up` does. It answers each with a
line. At the end of its input it stops everything that it started.
"""

import json
import os
import subprocess
import sys
import tempfile

VERSION, CONFIG = sys.argv[1:]
os.environ |= {"RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
os.environ |= {"RAY_enable_autoscaler_v2": "1" if VERSION == "2" else "0"}

from ray._private.node import Node  # noqa: E402
from ray._private.parameter import RayParams  # noqa: E402
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID  # noqa: E402

from helpers.node_start import start_again_if_slow  # noqa: E402

os.environ["RAY_OVERRIDE_NODE_ID_FOR_TESTING"] = FAKE_HEAD_NODE_ID
os.environ["RAY_CLOUD_INSTANCE_ID"] = FAKE_HEAD_NODE_ID
os.environ["RAY_NODE_TYPE_NAME"] = "ray.head.default"

EXTERNAL = {
    "1": """
import json, sys
from ray.autoscaler._private.monitor import Monitor
Monitor(sys.argv[1], lambda: json.loads(sys.argv[2])).run()
""",
    "2": """
import json, sys
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig, IConfigReader
from ray.autoscaler.v2.monitor import AutoscalerMonitor
class Reader(IConfigReader):
    def get_cached_autoscaling_config(self):
        return AutoscalingConfig(json.loads(sys.argv[2]))
    def refresh_cached_autoscaling_config(self):
        pass
AutoscalerMonitor(sys.argv[1], Reader()).run()
""",
}

folder = tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
ports = {"min_worker_port": 0, "max_worker_port": 0}
parameters = RayParams(
    num_cpus=0, include_dashboard=False, temp_dir=folder.name, no_monitor=True, **ports
)
head = start_again_if_slow(lambda: Node(parameters, head=True, shutdown_at_exit=False))
provider = {
    "type": "external",  # the fake one's own name needs a file that Ray's wheel lacks
    "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
    "disable_node_updaters": True,  # they set up nodes by SSH
    "disable_launch_config_check": True,
    "gcs_address": head.gcs_address,
    "head_node_id": FAKE_HEAD_NODE_ID,
    "launch_multiple": True,
}
lists = ["initialization_commands", "setup_commands", "head_setup_commands", "cluster_synced_files"]
lists += ["worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands"]
config = {
    "cluster_name": "fake",
    "provider": provider,
    "head_node_type": "ray.head.default",
    "upscaling_speed": 1.0,
    "idle_timeout_minutes": 5,
    "auth": {},
    "docker": {},
    "file_mounts": {},
    "file_mounts_sync_continuously": False,
    **{name: [] for name in lists},
    **json.loads(CONFIG),
}
print(head.gcs_address, flush=True)
external: subprocess.Popen[bytes] | None = None
for line in sys.stdin:
    if line.strip() == "external":
        script = [sys.executable, "-c", EXTERNAL[VERSION], head.gcs_address, json.dumps(config)]
        external = subprocess.Popen(script, stdout=sys.stderr)
    elif line.strip() == "end":
        assert external is not None
        external.kill()
        external.wait()
    elif line.strip() == "bootstrap":
        parameters.autoscaling_config = f"{folder.name}/ray_bootstrap_config.yaml"
        with open(parameters.autoscaling_config, "w") as file:
            json.dump(config, file)
        head.start_monitor()
    print("done", flush=True)

import psutil  # noqa: E402  # Ray's own copy, which importing Ray makes known

for process in psutil.Process().children(recursive=True):  # nodes are the autoscaler's children
    process.kill()
