"""`cl-ray export`: a run's networks as ONNX files or torch.export programs."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_ray.base_config import BaseConfig
from cl_ray.cli import RunPath, parse


class ExportCommand(BaseConfig):
    """Write a run's networks as files for other programs, each checked against PyTorch."""

    run: RunPath = Field(min_length=1, description="Run folder or its URI.")
    out: str = Field(description="Folder to write.")
    format: Literal["onnx", "torch"] = Field(
        "onnx", description="onnx, for onnxruntime and others, or torch, programs of torch.export."
    )
    checkpoint: str = Field("last", description="`last`, `best` or a checkpoint's name.")
    overwrite: bool = Field(False, description="Replace the export that is at `out`.")


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    asked = parse(ExportCommand, arguments, prog="cl-ray export")
    from cl_ray.export import export

    console = Console()
    with console.status("Exporting …"):
        record = export(asked.run, asked.out, asked.format, asked.checkpoint, asked.overwrite)
    kind = f"ONNX, opset {record['opset']}," if "opset" in record else "torch.export programs"
    line = f"{record['run']}, {record['checkpoint']}, as {kind} in {asked.out}"
    console.print(line, highlight=False, soft_wrap=True, markup=False)
    table = Table("file", "takes", "gives", "differs from PyTorch by", box=None, pad_edge=False)
    for file, about in record["files"].items():
        unit = "of 255" if about["output"]["dtype"] == "uint8" else "of the largest"
        difference = f"{about['largest_difference']:.2g} {unit}"
        table.add_row(file, words(about["input"]), words(about["output"]), difference)
    console.print(table)


def words(port: dict[str, Any]) -> Text:
    """An input or output: its name, type and shape."""
    return Text(f"{port['name']}: {port['dtype']} [{', '.join(map(str, port['shape']))}]")
