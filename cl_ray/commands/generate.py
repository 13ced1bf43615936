"""`cl-ray generate`: images of noise, or variants of images that are there."""

from collections.abc import Sequence

from pydantic import Field

from cl_ray.cli import parse
from cl_ray.commands.produce import PoolCommand, produce_here
from cl_ray.data.dataset import Dataset
from cl_ray.inference import Around, FromNoise, Work


class GenerateCommand(PoolCommand):
    """Make images: of noise, or, with --around, variants of a data set's images."""

    count: int = Field(1000, ge=1, description="Images to make of noise.")
    seed: int = Field(0, ge=0, lt=2**63, description="Which images.")
    around: str | None = Field(
        None, description="Data set whose images are varied instead, their labels kept."
    )
    split: str = Field("train", description="Which part of that data set.")
    copies: int = Field(1, ge=1, description="Variants of each of its images.")
    distance: float = Field(
        0.5, ge=0, description="How far a variant moves in the latent space; 0 reconstructs."
    )


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    asked = parse(GenerateCommand, arguments, prog="cl-ray generate")
    work: Work = FromNoise(asked.count, asked.seed)
    if asked.around is not None:
        dataset = Dataset.open(asked.around)
        dataset.groups(asked.split)
        work = Around(dataset, asked.split, asked.copies, asked.distance, asked.seed)
    produce_here(asked, work)
