"""Config of pairs, of views, and of where the training images are kept."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cl_ray.base_config import BaseConfig, marks

Condition = Literal["none", "classifier", "projection"]


class PairConfig(BaseConfig):
    """How the partner and the negative of a positive image are chosen."""

    mode: Literal["views", "labels"] = Field(
        "views",
        description="views: no labels; the positive's partner is another view of it. "
        "labels: supervised; the partner is another image of its class, the negative one of "
        "another class; images without a label pair as in views.",
    )
    candidates: int = Field(2, ge=1, le=1024, description="Candidates drawn for each negative.")
    negatives: Literal["far", "hard"] = Field(
        "far",
        description="Which candidate is the negative. far: the farthest in pixels. hard: of those "
        "that are far enough in pixels, the one whose embedding by D is most similar (costs a pass "
        "of D over all candidates; all images of a worker must fit in `shards.memory`).",
    )
    quantile: float = Field(
        0.1,
        gt=0,
        lt=1,
        description="No negative is nearer than this quantile of the data's pairwise distances.",
    )

    @model_validator(mode="after")
    def _check_candidates(self) -> "PairConfig":
        if self.negatives == "hard" and self.candidates < 2:
            raise ValueError(
                "pairs.negatives 'hard' chooses among candidates, and pairs.candidates is "
                f"{self.candidates}: take 4 or more"
            )
        return self


Rotate = Annotated[float, Field(ge=0, le=180, description="Largest rotation, degrees.")]
Shift = Annotated[
    float, Field(ge=0, le=0.5, description="Largest shift, as a fraction of the side.")
]
Scale = Annotated[
    float, Field(ge=0, lt=1, description="Largest change of scale; 0.2 is 0.8 to 1.25.")
]
Shear = Annotated[float, Field(ge=0, lt=80, description="Largest shear, degrees.")]
Warp = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        description="Elastic deformation: standard deviation of the smooth random displacement "
        "field, in half side lengths.",
    ),
]
Erase = Annotated[
    float,
    Field(ge=0, lt=1, description="Fraction of the cells of a 4 x 4 grid that are erased."),
]
Fraction = Annotated[float, Field(ge=0, le=1)]


class ViewConfig(BaseConfig):
    """A random view of an image. The defaults are for digits and never flip them."""

    rotate: Rotate = 20.0
    shift: Shift = 0.12
    scale: Scale = 0.2
    shear: Shear = 15.0
    warp: Warp = 0.1
    erase: Erase = 0.15
    flip: Fraction = Field(0.0, description="Probability of a horizontal flip.")
    crop: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Largest fraction of the area that a crop, resized to the full side, cuts off.",
    )
    brightness: Fraction = Field(0.0, description="Largest relative change of brightness.")
    contrast: Fraction = Field(0.0, description="Largest relative change of contrast.")
    saturation: Fraction = Field(0.0, description="Largest relative change of saturation.")
    hue: float = Field(
        0.0, ge=0, le=0.5, description="Largest change of hue, as a fraction of its circle."
    )
    greyscale: Fraction = Field(0.0, description="Probability of losing all colour.")
    blur: float = Field(
        0.0,
        ge=0,
        le=0.2,
        description="Largest standard deviation of a Gaussian blur, as a fraction of the side.",
    )

    @property
    def changes_color(self) -> bool:
        """Whether colours are changed."""
        return any((self.brightness, self.contrast, self.saturation, self.hue, self.greyscale))

    @property
    def photographic(self) -> bool:
        """Whether a transformation for photographs is on."""
        return any((self.flip, self.crop, self.changes_color, self.blur))


PHOTO_VIEWS = ViewConfig(
    rotate=0,
    shift=0,
    scale=0,
    shear=0,
    warp=0,
    erase=0,
    flip=0.5,
    crop=0.8,
    brightness=0.4,
    contrast=0.4,
    saturation=0.4,
    hue=0.1,
    greyscale=0.2,
    blur=0.009,
)
"""Views for photographs: those of SimCLR (Chen et al., 2020, appendix A), with the colour
distortion of strength 0.5 and crops of at least a fifth of the area (He et al., 2020, MoCo)."""


class AugmentConfig(ViewConfig):
    """Random augmentation of every image that D sees, real and fake; all 0 is none."""

    rotate: Rotate = 0.0
    shift: Shift = 0.0
    scale: Scale = 0.0
    shear: Shear = 0.0
    warp: Warp = 0.0
    erase: Erase = 0.0

    @property
    def used(self) -> bool:
        """Whether any augmentation is on."""
        return any(self.model_dump().values())


class ShardConfig(BaseConfig):
    """Where a worker keeps its partition of the training images."""

    memory: float = Field(
        2.0,
        gt=0,
        description="Partitions of up to this many GB are kept on the device; larger ones stream.",
    )
    window: int = Field(
        4096,
        ge=2,
        description="Shuffle window when images are streamed: rows that are shuffled and paired "
        "together, limited to 64 MB of pixels.",
    )


_OTHER_LABELS = marks(not_searchable="trials that use other labels are not comparable")


class LabelConfig(BaseConfig):
    """Which labels of the training images are used; images without a label are unlabelled."""

    count: int | None = Field(
        None,
        ge=1,
        description="Training images that keep their label, as many of each class as possible; "
        "the others are unlabelled. None: all that have a label.",
        json_schema_extra=_OTHER_LABELS,
    )
    seed: int = Field(
        0,
        ge=0,
        lt=2**63,
        description="Seed of the draw of these images.",
        json_schema_extra=_OTHER_LABELS,
    )
    batch_fraction: float = Field(
        0.125,
        ge=0,
        lt=1,
        description="Fraction of the positives of a batch that are drawn from the labelled images, "
        "where a smaller fraction of the training images is labelled.",
    )


class PairDataConfig(BaseConfig):
    """What determines the batches of pairs of every worker."""

    seed: int = Field(0, ge=0, lt=2**63)
    batch_size: int = Field(64, ge=2, description="Pairs per step, over all workers together.")
    epoch_repeats: int = Field(
        1,
        ge=1,
        description="Passes over the training images in an epoch. Few images should have several, "
        "as each epoch ends with a checkpoint and an evaluation.",
        json_schema_extra=marks(not_searchable="epochs are the budget of each trial"),
    )
    condition: Condition = "none"
    pairs: PairConfig = PairConfig()
    labels: LabelConfig = LabelConfig()
    shards: ShardConfig = ShardConfig()
