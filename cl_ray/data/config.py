"""How pairs are chosen, how views are made, and where a shard is kept."""

from typing import Literal

from pydantic import Field, model_validator

from cl_ray.base_config import BaseConfig

Condition = Literal["none", "classifier", "projection"]


class PairConfig(BaseConfig):
    """Who is the negative of whom."""

    mode: Literal["views", "labels"] = Field(
        "views",
        description="views: no labels; the positive's partner is another view of it. "
        "labels: supervised; another image of its class, and a negative of another class.",
    )
    candidates: int = Field(
        2, ge=1, le=1024, description="Negatives drawn for each positive, of which one is taken."
    )
    negatives: Literal["far", "hard"] = Field(
        "far",
        description="Which one. far: the farthest in pixels. hard: of those that are far enough in "
        "pixels, the one that D's embedding takes to be the most alike (costs D's pass over all "
        "candidates; the shard must stay on the device).",
    )
    quantile: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="No negative is nearer than this quantile of the data's pairwise distances.",
    )

    @model_validator(mode="after")
    def _chooses(self) -> "PairConfig":
        if self.negatives == "hard" and self.candidates < 2:
            raise ValueError(
                "pairs.negatives 'hard' chooses among candidates, and pairs.candidates is "
                f"{self.candidates}: take 4 or more"
            )
        return self


class ViewConfig(BaseConfig):
    """A random view of an image: an affine map, a smooth warp and erased patches. Never a flip."""

    rotate: float = Field(20.0, ge=0, le=180, description="Largest rotation, degrees.")
    shift: float = Field(0.12, ge=0, le=0.5, description="Largest shift, as a share of the side.")
    scale: float = Field(
        0.2, ge=0, lt=1, description="Largest change of scale; 0.2 is 0.8 to 1.25."
    )
    shear: float = Field(15.0, ge=0, lt=80, description="Largest shear, degrees.")
    warp: float = Field(
        0.1, ge=0, le=1, description="Spread of a smooth random displacement, in half sides."
    )
    erase: float = Field(
        0.15, ge=0, lt=1, description="Share of a 4 x 4 grid's cells that are blanked out."
    )


class AugmentConfig(ViewConfig):
    """Views through which D sees every real image and every fake; all 0 is none."""

    rotate: float = Field(
        0.0, ge=0, le=180, description="Largest rotation of what D sees, degrees."
    )
    shift: float = Field(
        0.0, ge=0, le=0.5, description="Largest shift of what D sees, as a share of the side."
    )
    scale: float = Field(0.0, ge=0, lt=1, description="Largest change of scale of what D sees.")
    shear: float = Field(0.0, ge=0, lt=80, description="Largest shear of what D sees, degrees.")
    warp: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Spread of a smooth random displacement of what D sees, in half sides.",
    )
    erase: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of a 4 x 4 grid's cells of what D sees that are blanked out.",
    )

    @property
    def used(self) -> bool:
        """Whether it changes an image."""
        return any(self.model_dump().values())


class ShardConfig(BaseConfig):
    """Where a worker keeps its share of the images."""

    memory: float = Field(
        2.0,
        gt=0,
        description="Shards of up to this many GB stay on the device; larger ones stream.",
    )
    window: int = Field(
        4096, ge=2, description="Rows that are shuffled and paired together when a shard streams."
    )


class PairDataConfig(BaseConfig):
    """What decides a worker's batches of pairs."""

    seed: int = Field(0, ge=0, lt=2**63, description="Everything random follows from it.")
    batch_size: int = Field(64, ge=2, description="Pairs a step, over all workers together.")
    condition: Condition = Field(
        "none",
        description="Whether G and D are told the labels, so that G makes images of a class asked "
        "for. classifier: D also names the class of what it sees (AC-GAN). projection: D's score "
        "is of an image and its class.",
    )
    pairs: PairConfig = PairConfig()
    shards: ShardConfig = ShardConfig()
