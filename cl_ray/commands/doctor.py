"""`cl-ray doctor`: what may be wrong with this machine or cluster, as a table."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from cl_ray.base_config import BaseConfig
from cl_ray.cli import parse_flags
from cl_ray.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from cl_ray.doctor import Finding


class DoctorCommand(BaseConfig):
    """Look for what would stop a run: versions, GPUs, storage, clocks, token, the network.

    Without a cluster, this machine alone is looked at; of a cluster, the machines that are up. The
    exit status is 1 where something fails.
    """

    address: str | None = Field(
        None, description="Ray cluster to examine; None obeys RAY_ADDRESS, as in a job."
    )
    storage: str | None = Field(
        None, description="Folder or URI for runs: whether every machine writes there."
    )
    workers: int = Field(
        0, ge=0, description="Have the cluster bring up machines for so many workers first."
    )
    cpus_per_worker: float = Field(1, gt=0, description="CPUs of each of them.")
    gpus_per_worker: float = Field(0, ge=0, description="GPUs of each of them.")
    constraints: Path = Field(
        Path("constraints.txt"), description="File of the tested versions, as package==version."
    )


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    asked = parse_flags(DoctorCommand, arguments, prog="cl-ray doctor")
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from cl_ray.doctor import examine_cluster, examine_here
    from cl_ray.training.cluster import cluster_to_join, ray_session

    console = Console()
    findings: list[Finding]
    if cluster_to_join(asked.address):
        with ray_session(asked.address, False, False, console):
            bring_up(asked, console)
            with console.status("Looking …"):
                findings = list(examine_cluster(asked.storage, asked.constraints))
    elif asked.workers:
        raise UserError("workers are brought up on a cluster: give its --address too.")
    else:
        with console.status("Looking …"):
            findings = list(examine_here(asked.storage, asked.constraints))
    colours = {"ok": "green", "warning": "yellow", "failure": "red"}
    table = Table("check", "where", "", "found", "what to do", box=None, pad_edge=False)
    for each in findings:
        state = f"[{colours[each.state]}]{each.state}[/]"
        table.add_row(
            each.check, escape(each.where), state, escape(each.found), escape(each.advice)
        )
    console.print(table)
    failures = sum(each.state == "failure" for each in findings)
    if failures:
        console.print(f"{failures} of {len(findings)} checks failed.")
        sys.exit(1)


def bring_up(asked: DoctorCommand, console: "Console") -> None:
    """Wait for room for the workers, as `cl-ray train` does; an autoscaler sees it."""
    if not asked.workers:
        return
    from cl_ray.config import Config
    from cl_ray.training.resources import plan_workers, wait_for_resources

    cpus, gpus = asked.cpus_per_worker, asked.gpus_per_worker
    config = Config(workers=asked.workers, cpus_per_worker=cpus, gpus_per_worker=gpus)
    needed = plan_workers(config, local=False)
    wait_for_resources(needed, asked.workers, lambda line: console.print(line, soft_wrap=True))
