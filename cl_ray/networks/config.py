"""Configs of the two networks."""

from typing import Literal

from pydantic import Field, model_validator

from cl_ray.base_config import BaseConfig

Family = Literal["convolutional", "residual", "style"]
ZERO_INITIALIZED: set[Family] = {"residual", "style"}
"""Families whose residual branches start at zero: the learning rates need a warm-up, or branches
overshoot and samples turn black; `spectral_norm` has no singular value to divide by."""


class GeneratorConfig(BaseConfig):
    """G: an encoder to the latent space and a decoder from it."""

    family: Family = Field("convolutional", description="Network family.")
    depth: int = Field(3, ge=1, le=12, description="Levels of the encoder and of the decoder.")
    width: int = Field(32, ge=4, le=1024, description="Channels at full size; doubled per halving.")
    latent: int = Field(10, ge=2, le=4096, description="Dimensions of the latent space.")
    latent_noise_std: float = Field(
        0.2,
        ge=0,
        description="Standard deviation of the noise added to the latent vectors of images in "
        "training, so that G also decodes their neighbours to images. With prior_codes 0, about "
        "0.7 is best.",
    )
    prior_codes: int = Field(
        20_000,
        ge=0,
        description="Training images, at most, whose latent vectors (codes) make the fitted prior, "
        "a kernel density estimate that samples are drawn from; it is fitted after each epoch. "
        "Fewer are taken above 64 latent dimensions, or if their pixels exceed 128 MiB. 0: sample "
        "from the training prior.",
    )


class DiscriminatorConfig(BaseConfig):
    """D: a trunk with a score head and a projection head."""

    family: Family = Field("convolutional", description="Network family.")
    depth: int = Field(3, ge=1, le=12, description="Levels of the trunk.")
    width: int = Field(32, ge=4, le=1024, description="Channels at full size; doubled per halving.")
    hidden: int = Field(
        256, ge=8, le=8192, description="Dimensions of the projection head's hidden layer."
    )
    embedding: int = Field(64, ge=2, le=4096, description="Dimensions of an embedding.")
    spectral_norm: bool = Field(
        False,
        description="Divide each weight that the score depends on by its largest singular value "
        "(convolutional family only).",
    )

    @model_validator(mode="after")
    def _normalisable(self) -> "DiscriminatorConfig":
        if self.spectral_norm and self.family in ZERO_INITIALIZED:
            raise ValueError(
                f"spectral_norm needs a family such as 'convolutional', not {self.family!r}: "
                "branches that start at zero have no singular value to divide by; or bound D by "
                "losses.r1"
            )
        return self
