"""The configs of the method and of its training loop, apart from where and how it is run."""

from pydantic import Field

from cl_ray.base_config import BaseConfig
from cl_ray.data.config import AugmentConfig, Condition, PairDataConfig, ViewConfig
from cl_ray.losses.config import LossConfig
from cl_ray.networks.config import DiscriminatorConfig, GeneratorConfig


class OptimizerConfig(BaseConfig):
    """Adam for each network (Kingma and Ba, 2015), and the EMA generator."""

    lr_g: float = Field(3e-3, gt=0, le=1, description="Learning rate of G.")
    lr_d: float = Field(2e-3, gt=0, le=1, description="Learning rate of D.")
    beta1: float = Field(0.5, ge=0, lt=1, description="Adam's decay of the first moment.")
    beta2: float = Field(0.99, ge=0, lt=1, description="Adam's decay of the second moment.")
    decay: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Share of the run, its last, over which both learning rates fall to 0.",
    )
    d_steps: int = Field(
        1, ge=1, le=100, description="Steps of D, all on the same pairs, for each step of G."
    )
    average: float = Field(
        0.998, ge=0, lt=1, description="Decay a step of the EMA generator; ramps up from 0.1."
    )


class GANConfig(BaseConfig):
    """What `ContrastiveGAN` depends on: networks, losses, views, optimizers and the seed."""

    seed: int = Field(0, ge=0, lt=2**63, description="Everything random follows from it.")
    condition: Condition = Field(
        "none",
        description="Whether G and D are told the labels, so that G makes images of a class asked "
        "for. classifier: D also names the class of what it sees (AC-GAN). projection: D's score "
        "is of an image and its class.",
    )
    views: ViewConfig = ViewConfig()
    augment: AugmentConfig = AugmentConfig()
    generator: GeneratorConfig = GeneratorConfig()
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    losses: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()


class CheckpointConfig(BaseConfig):
    """What is kept of a run on its way."""

    keep: int = Field(3, ge=1, description="Newest checkpoints kept; the best one is kept besides.")
    every: int = Field(
        200, ge=0, description="Steps between checkpoints within an epoch; 0 is at its end only."
    )
    metric: str = Field(
        "auto",
        description="The figure that marks the best: one of the epoch's, such as "
        "`g/reconstruction`, the smaller the better, or an evaluation's, such as "
        "`evaluation/linear_probe` or, with a condition, `evaluation/class_accuracy`. auto: "
        "`evaluation/frechet` where that is measured, else `g/reconstruction`.",
    )


class TrainerConfig(GANConfig, PairDataConfig):
    """What `Trainer` depends on."""

    epochs: int = Field(1, ge=1, description="Passes over the training images.")
    log_every: int = Field(20, ge=1, description="Steps between two lines of curves.")
    checkpoint: CheckpointConfig = CheckpointConfig()
