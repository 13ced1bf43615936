"""`cl-ray report`: the run's pictures, curves and metrics as one HTML page."""

import shlex
from collections.abc import Sequence

from pydantic import Field

from cl_ray.base_config import BaseConfig
from cl_ray.cli import RunPath, parse_flags
from cl_ray.config import Device


class ReportCommand(BaseConfig):
    """Write report.html, one page that needs nothing else, into a run folder."""

    run: RunPath = Field(min_length=1, description="The run folder's path or URI.")
    checkpoint: str = Field("last", description="Networks to show: last, best or a name.")
    device: Device = Field("auto", description="Where they compute.")
    projector: bool = Field(
        True, description="Write the embeddings for TensorBoard's projector into the run as well."
    )


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    asked = parse_flags(ReportCommand, arguments, prog="cl-ray report")
    from rich.console import Console

    from cl_ray.report.page import write_run_report

    console = Console()
    with console.status("Looking at the run …"):
        made = write_run_report(asked.run, asked.checkpoint, asked.device, asked.projector)
    for sentence in made.missing:
        console.print(f"Left out: {sentence}", soft_wrap=True, highlight=False)
    console.print(f"{made.location} ({made.bytes / 1e3:,.0f} kB)", soft_wrap=True, highlight=False)
    if made.projector:
        place = shlex.quote(made.location.removesuffix("/report.html"))
        console.print(
            f"The embeddings are in TensorBoard's projector: tensorboard --logdir {place}",
            soft_wrap=True,
            highlight=False,
        )
