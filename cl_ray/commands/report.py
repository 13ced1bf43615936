"""`cl-ray report`: write a run's images, curves and metrics as one HTML page."""

import shlex
from collections.abc import Sequence

from pydantic import Field

from cl_ray.base_config import BaseConfig
from cl_ray.cli import RunPath, parse_flags
from cl_ray.config import Device


class ReportCommand(BaseConfig):
    """Write report.html, one self-contained page, into a run folder."""

    run: RunPath = Field(min_length=1, description="The run folder's path or URI.")
    checkpoint: str = Field("last", description="Checkpoint to show: last, best or a name.")
    device: Device = Field("auto", description="Device that computes the images.")
    projector: bool = Field(
        True, description="Also write the embeddings for TensorBoard's projector into the run."
    )


def command(arguments: Sequence[str]) -> None:
    """Run `cl-ray report`."""
    flags = parse_flags(ReportCommand, arguments, prog="cl-ray report")
    from cl_ray.console import PlainConsole
    from cl_ray.report.page import write_run_report

    console = PlainConsole(soft_wrap=True, highlight=False)
    with console.status("Reading the run …"):
        report = write_run_report(flags.run, flags.checkpoint, flags.device, flags.projector)
    for reason in report.missing:
        console.print(f"Left out: {reason}")
    console.print(f"{report.location} ({report.bytes / 1e3:,.0f} kB)")
    if report.projector:
        folder = shlex.quote(report.location.removesuffix("/report.html"))
        console.print(f"Embeddings in TensorBoard's projector: tensorboard --logdir {folder}")
