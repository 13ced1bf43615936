"""What this machine can never do, found before Ray is started on it.

A cluster's machines say themselves what they have; here nothing is known of them.
"""

import os
import sys

from cl_ray.config import Config
from cl_ray.errors import UserError
from cl_ray.training.cluster import cluster_to_join


def starts_local_ray(address: str | None) -> bool:
    """Whether Ray will be started on this machine: no cluster is to be joined, and none runs."""
    ray = sys.modules.get("ray")
    return not cluster_to_join(address) and not (ray and ray.is_initialized())


def check_local_resources(config: Config) -> None:
    """See that this machine has the device, and the CPUs and GPUs of the least workers.

    Raises:
        UserError: It has not.
    """
    least = config.worker_range[0]
    if config.device not in ("auto", "cpu"):
        from cl_ray.device import select_device  # torch

        select_device(config.device)
    check_machine_has(config.cpus_per_worker, config.gpus_per_worker, "worker")
    cpus, there = config.cpus_per_worker or 1.0, local_cpus()
    if least * cpus > there:
        raise UserError(
            f"workers {least} with {cpus:g} CPU each need {least * cpus:g} CPU; this machine has "
            f"{there}: take --workers {int(there / cpus)}, or a smaller --cpus-per-worker."
        )


def check_machine_has(cpus: float | None, gpus: float | None, of: str) -> None:
    """See that this machine has so many CPUs and GPUs.

    Args:
        cpus: What one asks for; None is what there is.
        gpus: The same.
        of: Who asks, a part of the fields' names: `worker`, `actor` or `trial`.

    Raises:
        UserError: It has not.
    """
    for kind, asked, count in (("cpus", cpus, local_cpus), ("gpus", gpus, local_gpus)):
        if asked and asked > (there := count()):
            field = f"{kind}_per_{of}"
            way = f"take at most {there}" if there else "leave it out"
            raise UserError(
                f"{field} {asked:g} is more than this machine has, {there}: {way}, or join a "
                "cluster with --address."
            )


def local_cpus() -> int:
    """This machine's CPUs, of which Ray in a container may see fewer."""
    return os.cpu_count() or 1


def local_gpus() -> int:
    """The GPUs that torch can use here."""
    import torch

    return torch.cuda.device_count()
