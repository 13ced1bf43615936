"""`cl-ray doctor`: check this machine or a cluster, and print the findings as a table."""

import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from pydantic import Field

from cl_ray.base_config import BaseConfig
from cl_ray.cli import parse_flags
from cl_ray.errors import UserError

_COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


class DoctorCommand(BaseConfig):
    """Check for problems before a run: versions, GPUs, storage, clocks, token and network.

    Without a cluster only this machine is checked, else all live nodes. The exit status is 1 if a
    check fails.
    """

    address: str | None = Field(None, description="Ray cluster to check. None: RAY_ADDRESS.")
    storage: str | None = Field(
        None, description="Folder or URI for runs, which every node must be able to write."
    )
    workers: int = Field(
        0, ge=0, description="Workers for which the cluster must have started nodes first."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of each of these workers.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each of these workers.")
    constraints: Path = Field(
        Path("constraints.txt"),
        description="File of the tested versions, as package==version; may be missing.",
    )


def command(arguments: Sequence[str]) -> None:
    """Run `cl-ray doctor`."""
    flags = parse_flags(DoctorCommand, arguments, prog="cl-ray doctor")
    from rich.table import Table
    from rich.text import Text

    from cl_ray.console import PlainConsole, print_line
    from cl_ray.doctor import check_cluster, check_machine
    from cl_ray.training.ray_session import cluster_address, ray_session

    console = PlainConsole()
    if cluster_address(flags.address):
        from cl_ray.config import build_config

        workers = max(1, flags.workers)
        each = flags.model_dump(include={"cpus_per_worker", "gpus_per_worker"})
        config = build_config({"batch_size": 2 * workers, "workers": workers, **each}, "the flags")
        with ray_session(flags.address, False, False, console):
            if flags.workers:
                from cl_ray.training.resources import plan_workers, wait_for_resources

                needed = plan_workers(config, local=False)
                wait_for_resources(needed, flags.workers, partial(print_line, console))
            with console.status("Checking the cluster …"):
                findings = list(check_cluster(flags.storage, flags.constraints))
    elif (flags.workers, flags.cpus_per_worker, flags.gpus_per_worker) != (0, 1, 0):
        raise UserError("--workers and its resources apply to a cluster: give --address too.")
    else:
        with console.status("Checking this machine …"):
            findings = list(check_machine(flags.storage, flags.constraints))
    table = Table("check", "node", "", "found", "how to fix it", box=None, pad_edge=False)
    for each in findings:
        state = Text(each.state, _COLOURS[each.state])
        table.add_row(each.check, each.node, state, each.found, each.advice)
    console.print(table)
    failures = sum(each.state == "failure" for each in findings)
    if failures:
        console.print(f"{failures} of {len(findings)} checks failed.")
        sys.exit(1)
