"""`cl-ray generate`: images of noise, or variants of images that are there."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import tyro
from pydantic import Field, model_validator

from cl_ray.cli import parse
from cl_ray.commands.produce import ProduceCommand, produce_here

if TYPE_CHECKING:
    from cl_ray.inference.work import Work

COUNT, SPLIT, COPIES, DISTANCE = 1000, "train", 1, 0.7
"""What the flags that are left out stand for."""


class GenerateCommand(ProduceCommand):
    """Make images: of noise, or, with --around, variants of a data set's images."""

    count: int | None = Field(
        None, ge=1, description=f"Images to make of noise; None is {COUNT:,}."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Everything random follows from it.")
    truncation: float | None = Field(
        None,
        ge=0,
        le=1,
        description="Of a style-based generator: less than 1 gives less varied and safer images.",
    )
    label: Annotated[str | None, tyro.conf.arg(name="class")] = Field(
        None,
        description="Of a run that was trained with --condition: make only this class, a name or "
        "a number. None is all, as often as the training images have them.",
    )
    around: str | None = Field(
        None,
        min_length=1,
        description="Data set whose images are varied instead, their labels kept.",
    )
    split: str | None = Field(None, description=f"Which part of it; None is {SPLIT}.")
    copies: int | None = Field(
        None, ge=1, description=f"Variants of each of its images; None is {COPIES}."
    )
    distance: float | None = Field(
        None,
        ge=0,
        description="How far a variant moves in the latent space, as a share of a vector's own "
        f"length; 0 only reconstructs. None is {DISTANCE}.",
    )

    @model_validator(mode="after")
    def _goes_together(self) -> "GenerateCommand":
        if self.around is not None and self.count is not None:
            raise ValueError(
                f"count {self.count} is of no use with --around: --copies says how many variants "
                "of each image are made"
            )
        if self.around is not None and self.truncation is not None:
            raise ValueError(f"truncation {self.truncation} is of no use with --around: leave it")
        if self.around is not None and self.label is not None:
            raise ValueError(
                f"class {self.label} is of no use with --around: variants keep their image's class"
            )
        for name in ("split", "copies", "distance"):
            if self.around is None and getattr(self, name) is not None:
                raise ValueError(f"{name} {getattr(self, name)} is of no use without --around DATA")
        return self


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    asked = parse(GenerateCommand, arguments, prog="cl-ray generate")
    from cl_ray.data.dataset import Dataset
    from cl_ray.inference.work import Around, FromNoise

    work: Work
    if asked.around is None:
        truncation = 1.0 if asked.truncation is None else asked.truncation
        work = FromNoise(asked.count or COUNT, asked.seed, truncation, asked.label)
    else:
        dataset, split = Dataset.open(asked.around), asked.split or SPLIT
        dataset.groups(split)  # is there such a split?
        distance = DISTANCE if asked.distance is None else asked.distance
        work = Around(dataset, split, asked.copies or COPIES, distance, asked.seed)
    produce_here(asked, work)
