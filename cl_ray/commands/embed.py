"""`cl-ray embed`: D's features of a data set's images."""

from collections.abc import Sequence

from pydantic import Field

from cl_ray.cli import parse
from cl_ray.commands.produce import PoolCommand, produce_here
from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.inference import Embed


class EmbedCommand(PoolCommand):
    """Write D's features of images: columns id, label (if there is one) and embedding."""

    data: str = Field("mnist", description="`mnist` or a folder or URI that `cl-ray data` wrote.")
    split: str = Field("test", description="Which part of it.")


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    asked = parse(EmbedCommand, arguments, prog="cl-ray embed")
    if not asked.out.rstrip("/").endswith(".parquet"):
        raise UserError(f"out {asked.out!r} must end in .parquet: embeddings are no pictures.")
    dataset = Dataset.open(asked.data)
    dataset.groups(asked.split)
    produce_here(asked, Embed(dataset, asked.split))
