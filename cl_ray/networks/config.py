"""How the two networks are built."""

from typing import Literal

from pydantic import Field, model_validator

from cl_ray.base_config import BaseConfig

Family = Literal["convolutional", "residual", "style"]


class GeneratorConfig(BaseConfig):
    """G: an encoder to the latent space and a decoder back."""

    family: Family = Field("convolutional", description="Kind of network.")
    depth: int = Field(3, ge=1, le=12, description="Levels of the encoder and of the decoder.")
    width: int = Field(32, ge=4, le=1024, description="Channels at full size; doubled per halving.")
    latent: int = Field(10, ge=2, le=4096, description="Dimensions of the latent space.")
    latent_noise_std: float = Field(
        0.2,
        ge=0,
        description="Spread of the noise that moves an image's latent vector in training, so that "
        "what lies near it is an image too. With prior 0 some 0.7 is best: noise falls far off.",
    )
    prior: int = Field(
        50,
        ge=0,
        le=1000,
        description="Gaussians that are fitted after each epoch to the latent vectors of images; "
        "samples are drawn from them. 0: samples are drawn from the noise of training.",
    )


class DiscriminatorConfig(BaseConfig):
    """D: a trunk with a score head and a projection head."""

    family: Family = Field("convolutional", description="Kind of network.")
    depth: int = Field(3, ge=1, le=12, description="Levels of the trunk.")
    width: int = Field(32, ge=4, le=1024, description="Channels at full size; doubled per halving.")
    hidden: int = Field(256, ge=8, le=8192, description="Dimensions inside the projection head.")
    embedding: int = Field(64, ge=2, le=4096, description="Dimensions of the projection e.")
    spectral_norm: bool = Field(
        False,
        description="Divide each weight on the score's way by its largest singular value "
        "(convolutional family).",
    )

    @model_validator(mode="after")
    def _normalisable(self) -> "DiscriminatorConfig":
        if self.spectral_norm and self.family != "convolutional":
            raise ValueError(
                f"spectral_norm does not go with family {self.family!r}, whose blocks start at "
                "zero and so have no singular value to divide by: take 'convolutional', or "
                "losses.r1 to bound D"
            )
        return self
