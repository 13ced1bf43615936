"""A run's metrics as Ray application metrics, which each node's metrics port serves to Prometheus.

Ray puts `ray_` before the names: the epoch is `ray_cl_ray_epoch{run="demo",trial=""}`. The
dashboard's Metrics page shows them where Grafana is set up, by docs/grafana.json.
"""

import re
from collections.abc import Mapping

from ray.util.metrics import Gauge

PREFIX = "cl_ray_"


class PrometheusGauges:
    """The metrics of one run at a time, the newest of each.

    Args:
        run: The run's name, or the search's that it is a trial of.
        trial: The trial's number; empty for a run of its own.
    """

    def __init__(self, run: str, trial: str = ""):
        self.tags = {"run": run, "trial": trial}
        self.gauges: dict[str, Gauge] = {}
        self.set({"running": 1})

    def set(self, metrics: Mapping[str, float]) -> None:
        """Take these metrics' new values; `d/adversarial` is `cl_ray_d_adversarial`."""
        for name, value in metrics.items():
            if name not in self.gauges:
                plain = PREFIX + re.sub(r"\W", "_", name)
                self.gauges[name] = Gauge(plain, name, tag_keys=tuple(self.tags))
            self.gauges[name].set(value, self.tags)

    def close(self) -> None:
        """Say that the run is over; its last metrics stay until its process ends."""
        self.set({"running": 0})
