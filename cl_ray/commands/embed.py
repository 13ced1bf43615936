"""`cl-ray embed`: D's representation of a data set's images."""

from collections.abc import Sequence

from pydantic import Field

from cl_ray.cli import parse
from cl_ray.commands.produce import ProduceCommand, produce_here
from cl_ray.errors import UserError


class EmbedCommand(ProduceCommand):
    """Write D's representation of images: columns id, label (if there is one) and embedding."""

    out: str = Field(
        description="Folder or URI whose name ends in .parquet: a folder of Parquet files that "
        "reads as one table, by pyarrow, pandas, Spark or any other that reads such folders."
    )
    data: str = Field(
        "mnist",
        min_length=1,
        description="`mnist` or a folder or URI that `cl-ray data` wrote.",
    )
    split: str = Field("test", description="Which part of it.")


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    asked = parse(EmbedCommand, arguments, prog="cl-ray embed")
    from cl_ray.data.dataset import Dataset
    from cl_ray.inference.output import Output
    from cl_ray.inference.work import Embed

    if not Output.at(asked.out).parquet:
        raise UserError(f"out {asked.out!r} must end in .parquet: embeddings are no pictures.")
    dataset = Dataset.open(asked.data)
    dataset.groups(asked.split)  # is there such a split?
    produce_here(asked, Embed(dataset, asked.split))
