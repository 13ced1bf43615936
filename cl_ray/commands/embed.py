"""`cl-ray embed`: D's representation of a dataset's images."""

from collections.abc import Sequence

from pydantic import Field

from cl_ray.cli import parse_flags
from cl_ray.commands.generate import InferenceCommand, run_command
from cl_ray.errors import UserError


class EmbedCommand(InferenceCommand):
    """Write D's representation of images: columns id, label, origin (if any) and embedding."""

    out: str = Field(
        description="Folder or URI whose name ends in .parquet: a folder of Parquet files that "
        "reads as one table, by pyarrow, pandas, Spark or any other that reads such folders."
    )
    data: str = Field(
        "mnist", min_length=1, description="`mnist`, or a folder or URI that `cl-ray data` wrote."
    )
    split: str = Field("test", description="Which of its splits.")


def command(arguments: Sequence[str]) -> None:
    """Run `cl-ray embed`."""
    options = parse_flags(EmbedCommand, arguments, prog="cl-ray embed")
    from cl_ray.data.dataset import Dataset
    from cl_ray.inference.output import OutputFolder
    from cl_ray.inference.tasks import EmbedTask

    if not OutputFolder.resolve(options.out).parquet:
        raise UserError(f"out {options.out!r} must end in .parquet: embeddings are no images.")
    dataset = Dataset.open(options.data)
    dataset.row_groups(options.split)  # raises if there is no such split
    run_command(options, EmbedTask(dataset, options.split))
