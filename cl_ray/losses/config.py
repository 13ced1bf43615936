"""The weight of each term; a weight of 0 leaves the term out."""

from typing import Literal

from pydantic import Field, model_validator

from cl_ray.base_config import BaseConfig

Objective = Literal[
    "non-saturating",
    "pair-critic",
    "minimax",
    "hinge",
    "least-squares",
    "wasserstein",
    "relativistic",
]


class LossConfig(BaseConfig):
    """What D and G are asked for, and how much."""

    objective: Objective = Field("non-saturating", description="The adversarial objective.")
    adversarial: float = Field(
        1.0, ge=0, description="Weight of the adversarial term, for D and G."
    )
    approximate_r1: float = Field(
        0.05, ge=0, description="Weight of the squared slope of D's score at real images."
    )
    r1_spread: float = Field(
        0.1, gt=0, le=1, description="Step in each pixel by which that slope is taken."
    )
    r1: float = Field(
        0.0, ge=0, description="Weight of the exact squared slope of D's score at real images."
    )
    r2: float = Field(0.0, ge=0, description="Weight of the same at fakes of noise.")
    gradient_penalty: float = Field(
        0.0,
        ge=0,
        description="Weight of (|slope| - 1)^2 between real images and fakes of noise.",
    )
    form: Literal["info-nce", "contrad"] = Field(
        "info-nce",
        description="How D learns from views. info-nce: against the rest of the batch and the "
        "fakes. contrad: against the rest alone, the fakes drawn together as one class, and its "
        "score read off features that learn from these alone.",
    )
    contrastive: float = Field(1.0, ge=0, description="Weight of InfoNCE in D's loss.")
    fakes: float = Field(
        1.0, ge=0, description="Weight of drawing fakes together; only in the form contrad."
    )
    temperature: float = Field(
        0.2,
        gt=0,
        le=10,
        description="Temperature of InfoNCE, of the fakes as one class and of the pair score.",
    )
    pair: float = Field(0.1, ge=0, description="Weight of the pair score in D's loss.")
    reconstruction: float = Field(60.0, ge=0, description="Weight of |G(x) - x| in G's loss.")
    pair_confusion: float = Field(
        0.1, ge=0, description="Weight in G's loss of D's advantage in telling f+ from f-."
    )
    classification: float = Field(
        1.0,
        ge=0,
        description="Weight, for D and G, of naming the class; only with condition classifier.",
    )
    uniformity: float = Field(
        1.0,
        ge=0,
        description="Weight in G's loss of how unevenly its encoder spreads images over the sphere "
        "that noise is drawn from.",
    )

    @property
    def of_views(self) -> bool:
        """Whether D learns from views of x+."""
        return bool(self.contrastive or (self.form == "contrad" and self.fakes))

    @model_validator(mode="after")
    def _bounded(self) -> "LossConfig":
        if self.objective == "wasserstein" and not self.gradient_penalty:
            raise ValueError(
                "objective 'wasserstein' has no bound of its own: set losses.gradient_penalty, "
                "10 as in its paper"
            )
        if self.form == "contrad" and not (self.contrastive or self.fakes or self.pair):
            raise ValueError(
                "form 'contrad' lets D's features learn from losses.contrastive, losses.fakes and "
                "losses.pair alone, and all are 0: raise one"
            )
        return self
