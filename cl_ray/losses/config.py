"""Weights of the losses; a weight of 0 leaves the loss out."""

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
UNBOUNDED: set[Objective] = {"wasserstein"}
"""Objectives under which D needs `losses.gradient_penalty`: D's loss has no minimum without it."""
RELATIVISTIC: set[Objective] = {"relativistic"}
"""Objectives whose loss of G depends on the scores of real images, which takes a pass of D."""


class LossConfig(BaseConfig):
    """The adversarial objective, and the weight of each loss of D and G."""

    objective: Objective = Field("wasserstein", description="The adversarial objective.")
    adversarial: float = Field(
        1.0, ge=0, description="Weight of the adversarial loss, for D and G."
    )
    approximate_r1: float = Field(
        0.0,
        ge=0,
        description="Weight of the R1 penalty, approximated by a finite difference.",
    )
    r1_step: float = Field(
        0.1, gt=0, le=1, description="Step of that finite difference in each pixel."
    )
    r1: float = Field(
        0.0, ge=0, description="Weight of D's squared gradient at real images, exact."
    )
    r2: float = Field(0.0, ge=0, description="Weight of the same at fakes of noise.")
    gradient_penalty: float = Field(
        10.0,
        ge=0,
        description="Weight of the WGAN gradient penalty, (|gradient of D| - 1)^2, at random "
        "interpolations between real images and fakes G(z).",
    )
    form: Literal["info-nce", "contrad"] = Field(
        "info-nce",
        description="How D learns from views. info-nce: x-, the rest of the batch and the fakes "
        "are negatives. contrad: only the rest of the batch is; the fakes form one class, and the "
        "features get no gradient from the score.",
    )
    contrastive: float = Field(1.0, ge=0, description="Weight of InfoNCE in D's loss.")
    fake_supcon: float = Field(
        1.0, ge=0, description="Weight of the loss of fakes as one class; only in form contrad."
    )
    temperature: float = Field(
        0.2, gt=0, le=10, description="Temperature of the contrastive losses and the pair score."
    )
    pair: float = Field(
        0.1, ge=0, description="Weight in D's loss of telling which fake was made from x+."
    )
    reconstruction: float = Field(60.0, ge=0, description="Weight of |G(x) - x| in G's loss.")
    pair_confusion: float = Field(
        0.1, ge=0, description="Weight in G's loss of making G(x+) and G(x-) hard to tell apart."
    )
    classification: float = Field(
        1.0,
        ge=0,
        description="Weight of the class loss, for D and G; only with condition classifier.",
    )
    consistency: float = Field(
        1.0,
        ge=0,
        description="Weight in D's loss of FixMatch's consistency loss: views of an unlabelled x+ "
        "should get the class that D predicts for x+; only with condition classifier.",
    )
    confidence: float = Field(
        0.95, ge=0, le=1, description="Minimum probability of a pseudo-label (tau in FixMatch)."
    )
    uniformity: float = Field(
        1.0,
        ge=0,
        description="Weight in G's loss of the uniformity of latent vectors on their sphere.",
    )

    @property
    def uses_views(self) -> bool:
        """Whether D learns from views of x+."""
        return bool(self.contrastive or (self.form == "contrad" and self.fake_supcon))

    @model_validator(mode="after")
    def _bounded(self) -> "LossConfig":
        if self.objective in UNBOUNDED and not self.gradient_penalty:
            raise ValueError(
                f"objective {self.objective!r} does not bound D by itself: set "
                "losses.gradient_penalty, such as 10"
            )
        if self.form == "contrad" and not (self.contrastive or self.fake_supcon or self.pair):
            raise ValueError(
                "form 'contrad' trains D's features by losses.contrastive, losses.fake_supcon and "
                "losses.pair only, and all are 0: raise one"
            )
        return self
