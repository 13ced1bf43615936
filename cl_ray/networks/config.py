"""How the two networks are built."""

from typing import Literal

from pydantic import Field

from cl_ray.model import Model


class GeneratorConfig(Model):
    """G: an encoder to the latent space and a decoder back."""

    family: Literal["convolutional"] = Field("convolutional", description="Kind of network.")
    depth: int = Field(3, ge=1, le=12, description="Convolutions in the encoder and the decoder.")
    width: int = Field(32, ge=4, le=1024, description="Channels at full size; doubled per halving.")
    latent: int = Field(10, ge=1, le=4096, description="Dimensions of the latent space.")
    jitter: float = Field(
        0.7,
        ge=0,
        description="Spread of the noise that moves an image's latent vector in training, so that "
        "the vectors spread out over the sphere that noise is drawn from.",
    )


class DiscriminatorConfig(Model):
    """D: a trunk with a score head and a projection head."""

    family: Literal["convolutional"] = Field("convolutional", description="Kind of network.")
    depth: int = Field(3, ge=1, le=12, description="Convolutions in the trunk.")
    width: int = Field(32, ge=4, le=1024, description="Channels at full size; doubled per halving.")
    hidden: int = Field(256, ge=8, le=8192, description="Dimensions inside the projection head.")
    embedding: int = Field(64, ge=2, le=4096, description="Dimensions of the projection e.")
