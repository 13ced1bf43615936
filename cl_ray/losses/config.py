"""The weight of each term; a weight of 0 leaves the term out."""

from typing import Literal

from pydantic import Field

from cl_ray.model import Model


class LossConfig(Model):
    """What D and G are asked for, and how much."""

    objective: Literal["non-saturating", "pair-critic"] = Field(
        "non-saturating", description="The adversarial objective."
    )
    adversarial: float = Field(
        1.0, ge=0, description="Weight of the adversarial term, for D and G."
    )
    approximate_r1: float = Field(
        0.05, ge=0, description="Weight of the squared slope of D's score at real images."
    )
    r1_spread: float = Field(
        0.1, gt=0, le=1, description="Step in each pixel by which that slope is taken."
    )
    contrastive: float = Field(1.0, ge=0, description="Weight of InfoNCE in D's loss.")
    temperature: float = Field(0.2, gt=0, le=10, description="Temperature of InfoNCE.")
    pair: float = Field(0.1, ge=0, description="Weight of the pair score in D's loss.")
    reconstruction: float = Field(40.0, ge=0, description="Weight of |G(x) - x| in G's loss.")
    indistinguishability: float = Field(
        0.1, ge=0, description="Weight in G's loss of D's advantage in telling f+ from f-."
    )
