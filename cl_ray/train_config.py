"""Configs of the method and of its training loop; not of where and how they run."""

from typing import Literal

from pydantic import Field

from cl_ray.base_config import BaseConfig, marks
from cl_ray.data.config import AugmentConfig, Condition, PairDataConfig, ViewConfig
from cl_ray.losses.config import LossConfig
from cl_ray.networks.config import ZERO_INITIALIZED, DiscriminatorConfig, GeneratorConfig


class OptimizerConfig(BaseConfig):
    """The optimizer of each network, and the EMA generator."""

    algorithm: Literal["muon", "adam"] = Field(
        "muon",
        description="muon: Muon (Jordan et al., 2024) for matrices and kernels of convolutions, "
        "Adam (Kingma and Ba, 2015) for biases, other vectors and G's class embedding. adam: Adam "
        "for all.",
    )
    lr_g: float = Field(0.01, gt=0, le=1, description="Learning rate of G.")
    lr_d: float = Field(0.005, gt=0, le=1, description="Learning rate of D.")
    beta1: float = Field(
        0.5, ge=0, lt=1, description="Decay rate of the momentum, and of Adam's first moment."
    )
    beta2: float = Field(0.99, ge=0, lt=1, description="Adam's decay rate of the second moment.")
    weight_decay_g: float = Field(
        0.0,
        ge=0,
        le=10,
        description="Decoupled weight decay of G's matrices: a step subtracts lr * decay * weight. "
        "Only with algorithm muon.",
    )
    weight_decay_d: float = Field(0.5, ge=0, le=10, description="The same of D's matrices.")
    lr_warmup_fraction: float | None = Field(
        None,
        ge=0,
        le=1,
        description="First fraction of the run over which both learning rates rise linearly. "
        "None: 0.05 if a network is of the family residual or style, else 0.",
    )
    lr_decay_fraction: float = Field(
        0.5,
        ge=0,
        le=1,
        description="Last fraction of the run over which both learning rates decay linearly to 0.",
    )
    d_steps: int = Field(
        1, ge=1, le=100, description="Steps of D per step of G, all on the same pairs."
    )
    ema_decay: float = Field(
        0.998,
        ge=0,
        lt=1,
        description="Decay per step of the EMA generator; it ramps up from 0.1.",
    )


class GANConfig(BaseConfig):
    """What `ContrastiveGAN` depends on: networks, losses, views, optimizers and the seed."""

    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all random numbers.")
    condition: Condition = Field(
        "none",
        description="Whether G and D are conditioned on labels, so that G generates images of a "
        "given class. classifier: D also predicts the class (AC-GAN). projection: the class is "
        "part of D's score (projection discriminator).",
    )
    views: ViewConfig = ViewConfig()
    augment: AugmentConfig = AugmentConfig()
    generator: GeneratorConfig = Field(GeneratorConfig(), json_schema_extra=marks("architecture"))
    discriminator: DiscriminatorConfig = Field(
        DiscriminatorConfig(), json_schema_extra=marks("architecture")
    )
    losses: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()

    def lr_scale(self, step: int, steps: int) -> float:
        """Return the fraction of the learning rates, 0 to 1, after `step` steps of a run."""
        families = {self.generator.family, self.discriminator.family}
        warmup = self.optimizer.lr_warmup_fraction
        if warmup is None:
            warmup = 0.05 if families & ZERO_INITIALIZED else 0.0
        decay = self.optimizer.lr_decay_fraction
        rising = (step + 1) / (warmup * steps) if warmup else 1.0
        falling = (steps - step) / (decay * steps) if decay else 1.0
        return min(1.0, rising, max(0.0, falling))

    def loss_names(self, unlabelled: bool = False) -> list[str]:
        """Return the names of the losses and scores among an epoch's metrics, in their order.

        `unlabelled`: whether some training images have no label.
        """
        weights, classifies = self.losses, self.condition == "classifier"
        is_consistent = classifies and unlabelled and weights.uses_views and weights.consistency
        is_used = {
            "d/adversarial": True,
            "d/contrastive": weights.contrastive,
            "d/fake_supcon": weights.form == "contrad" and weights.fake_supcon,
            "d/pair": weights.pair,
            "d/classification": classifies,
            "d/consistency": is_consistent,
            "d/approximate_r1": weights.approximate_r1,
            "d/r1": weights.r1,
            "d/r2": weights.r2,
            "d/gradient_penalty": weights.gradient_penalty,
            "score/real": True,
            "score/fake": True,
            "g/adversarial": True,
            "g/reconstruction": True,
            "g/uniformity": weights.uniformity,
            "g/pair_confusion": weights.pair_confusion,
            "g/classification": classifies,
        }
        return [name for name, used in is_used.items() if used]


class CheckpointConfig(BaseConfig):
    """Which checkpoints of a run are written and kept."""

    keep: int = Field(
        3,
        ge=1,
        description="Newest checkpoints to keep; the best one is kept as well.",
        json_schema_extra=marks("changeable_on_resume"),
    )
    every: int = Field(
        200,
        ge=0,
        description="Steps between checkpoints within an epoch; 0: only at its end.",
        json_schema_extra=marks("changeable_on_resume"),
    )
    metric: str = Field(
        "auto",
        description="Metric that selects the best checkpoint: one of an epoch, such as "
        "`g/reconstruction` (smaller is better), or one of an evaluation, such as "
        "`evaluation/linear_probe` or, with a condition, `evaluation/class_accuracy`. auto: "
        "`evaluation/frechet` if that is measured, else `g/reconstruction`.",
    )


class TrainerConfig(GANConfig, PairDataConfig):
    """What `Trainer` depends on."""

    epochs: int = Field(
        1,
        ge=1,
        description="Epochs, of `epoch_repeats` passes over the training images.",
        json_schema_extra=marks(
            "changeable_on_resume", not_searchable="--epochs is the budget of each trial"
        ),
    )
    log_every: int = Field(
        20,
        ge=1,
        description="Steps between two logged points of the curves.",
        json_schema_extra=marks("changeable_on_resume"),
    )
    checkpoint: CheckpointConfig = Field(
        CheckpointConfig(), json_schema_extra=marks(not_searchable="it changes no metric")
    )
