"""`cl-ray export`: a run's networks as ONNX files or torch.export programs."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from rich.table import Table
from rich.text import Text

from cl_ray.base_config import BaseConfig
from cl_ray.cli import RunPath, parse_flags
from cl_ray.console import PlainConsole, print_line


class ExportCommand(BaseConfig):
    """Write a run's networks as files for other programs, each checked against PyTorch."""

    run: RunPath = Field(min_length=1, description="Run folder or its URI.")
    out: str = Field(description="Folder to write.")
    format: Literal["onnx", "torch"] = Field(
        "onnx", description="onnx, for onnxruntime and others, or torch, programs of torch.export."
    )
    checkpoint: str = Field("last", description="`last`, `best` or a checkpoint's name.")
    overwrite: bool = Field(False, description="Replace the export at `out`.")


def command(arguments: Sequence[str]) -> None:
    """Run the command."""
    asked = parse_flags(ExportCommand, arguments, prog="cl-ray export")
    from cl_ray.export import export
    from cl_ray.training.preflight import check_outlives_job

    check_outlives_job(asked.out, "out")
    console = PlainConsole()
    with console.status("Exporting …"):
        metadata = export(asked.run, asked.out, asked.format, asked.checkpoint, asked.overwrite)
    kind = "torch.export programs"
    if "opset" in metadata:
        kind = f"ONNX, opset {metadata['opset']},"
    print_line(console, f"{metadata['run']}, {metadata['checkpoint']}, as {kind} in {asked.out}")
    table = Table("file", "takes", "gives", "differs from PyTorch by", box=None, pad_edge=False)
    for file, described in metadata["files"].items():
        unit = "of 255" if described["output"]["dtype"] == "uint8" else "of the largest"
        difference = f"{described['largest_difference']:.2g} {unit}"
        table.add_row(file, _text(described["input"]), _text(described["output"]), difference)
    console.print(table)


def _text(port: dict[str, Any]) -> Text:
    """Format the name, type and shape of an input or output."""
    return Text(f"{port['name']}: {port['dtype']} [{', '.join(map(str, port['shape']))}]")
