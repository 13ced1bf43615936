"""The method: G, D, the EMA generator, and one training step.

For a pair (x+, x-), G gives three fakes, G(x+), G(x-) and G(z). D separates real images from fakes,
classifies which of G(x+) and G(x-) was made from x+, and attracts two views of x+ in its embedding
while it repels x-, the rest of the batch and the fakes; a penalty keeps its score smooth. G fools
D, reconstructs the images, hides G(x+) from G(x-), and spreads its latent vectors over the sphere.

Noise and views are drawn for the global batch, and every loss is a mean over the global batch. So
N workers take the same step as one.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.batch import (
    DiscriminatorInput,
    DiscriminatorPass,
    FakeParts,
    Losses,
    PairBatch,
    stack_scores,
)
from cl_ray.cuda_graph import GraphedStep
from cl_ray.errors import UserError
from cl_ray.forward import discriminate, discriminate_fakes, discriminator_input, generate
from cl_ray.losses.adversarial import OBJECTIVES, RELATIVISTIC, Scores
from cl_ray.losses.classification import auxiliary_classification
from cl_ray.losses.contrastive import view_losses
from cl_ray.losses.pairwise import pair_classification, pair_confusion, pair_margin, reconstruction
from cl_ray.losses.penalties import discriminator_penalties
from cl_ray.losses.uniformity import uniformity
from cl_ray.networks.build import build_networks
from cl_ray.networks.normalize import to_unit
from cl_ray.optimizer import NetworkOptimizer, global_row_weights, weighted_means
from cl_ray.step_noise import StepNoise, sample_step_noise
from cl_ray.train_config import GANConfig

STATEFUL = ("generator", "discriminator", "ema_generator", "g_optimizer", "d_optimizer")
"""Parts of the state of a ContrastiveGAN."""


class ContrastiveGAN:
    """G, D and their optimizers.

    Args:
        config: Networks, losses, views, optimizers and the seed.
        shape: Height, width and channels of an image.
        device: Device of the networks.
        dtype: Type of weights and computation; torch.bfloat16 means float32 weights and autocast.
        classes: Names of the labels; given if and only if `config.condition` uses them.

    Raises:
        UserError: `classes` does not fit `config.condition`.
    """

    def __init__(
        self,
        config: GANConfig,
        shape: tuple[int, int, int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        classes: Sequence[str] = (),
    ):
        self.config, self.shape, self.device = config, shape, torch.device(device)
        self.classes = tuple(classes)
        if bool(self.classes) != (config.condition != "none"):
            raise UserError(
                f"condition {config.condition!r} does not fit {len(self.classes)} classes: give "
                "`classes`, the names of the labels, with a condition and only then."
            )
        self.autocast = dtype == torch.bfloat16
        self.dtype = torch.float32 if self.autocast else dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            generator, discriminator = build_networks(config, shape, len(self.classes))
        placement: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.generator = generator.to(**placement, memory_format=torch.channels_last)
        self.discriminator = discriminator.to(**placement, memory_format=torch.channels_last)
        self.g_params: list[Tensor] = list(generator.parameters())
        self.d_params: list[Tensor] = list(discriminator.parameters())
        distributed.broadcast([*self.g_params, *self.d_params])
        self.ema_generator = copy.deepcopy(generator).requires_grad_(False)
        self.use_cuda_graph = self.device.type == "cuda" and distributed.world()[1] == 1
        self.g_optimizer = NetworkOptimizer(generator, "g", config, self.use_cuda_graph)
        self.d_optimizer = NetworkOptimizer(discriminator, "d", config, self.use_cuda_graph)
        self.objective = OBJECTIVES[config.losses.objective]
        self.steps = 0
        self._reset_cuda_graph()

    def train_step(self, batch: PairBatch) -> Losses:
        """Take `d_steps` steps of D, then one step of G.

        Args:
            batch: This rank's pairs; the batches of all ranks together are the global batch.

        Returns:
            This rank's part of each loss and mean score, scalars; their sum over ranks is the mean
            over the global batch.
        """
        noise_dim, pairs = self.generator.decoder_noise_dim, len(batch.present)
        step_noise = sample_step_noise(
            self.config, self.shape, noise_dim, self.steps, pairs, self.device, self.dtype
        )
        metrics = self._update_networks(batch, step_noise)
        self.update_ema()
        self.steps += 1
        return metrics

    def update_networks(self, batch: PairBatch, step_noise: list[StepNoise]) -> Losses:
        """Update D and G: a function of tensors only, which a CUDA graph can capture."""
        batch = self.normalize(batch)
        row_weights = global_row_weights(batch.present, self.dtype)
        for noise in step_noise:
            is_last = noise is step_noise[-1]  # G learns from the last fakes
            with self.mixed_precision(), torch.set_grad_enabled(is_last):
                fake, latents = generate(self.generator, batch, noise)
            with self.mixed_precision():
                seen = discriminator_input(batch, fake, noise)
                d = discriminate(self.discriminator, seen, batch)
                d_losses = self.discriminator_loss(d, seen, batch, noise)
            d_metrics = self.d_optimizer.minimize(d_losses, row_weights)
        with self.mixed_precision():
            g_losses = self.generator_loss(d, fake, latents, batch, noise)
        g_metrics = self.g_optimizer.minimize(g_losses, row_weights)
        return d_metrics | weighted_means(d.mean_scores(), row_weights) | g_metrics

    def discriminator_loss(
        self, d: DiscriminatorPass, seen: DiscriminatorInput, batch: PairBatch, noise: StepNoise
    ) -> Losses:
        """Compute D's losses from its output `d` on the images that it has `seen`."""
        weights = self.config.losses
        scores = Scores(stack_scores(d.fake), stack_scores(d.real))
        losses = {"adversarial": self.objective(scores, "discriminator")}
        losses |= view_losses(d, batch.present, weights)
        if weights.pair:
            anchor, right, wrong = d.real.positive, d.fake.positive, d.fake.negative
            margin = pair_margin(
                anchor.embedding, right.embedding, wrong.embedding, weights.temperature
            )
            losses["pair"] = pair_classification(margin)
        if self.config.condition == "classifier":
            losses["classification"] = auxiliary_classification(
                d.real, batch.real_labels
            ) + auxiliary_classification(d.fake, batch.fake_labels)
        return losses | discriminator_penalties(
            self.discriminator,
            weights,
            seen.real.positive,
            seen.fake.noise,
            noise.rademacher_bits,
            noise.interpolation_alpha,
            None if batch.labels is None else batch.labels[:, 0],
        )

    def generator_loss(
        self,
        d: DiscriminatorPass,
        fake: FakeParts[Tensor],
        latents: Tensor,
        batch: PairBatch,
        noise: StepNoise,
    ) -> Losses:
        """Compute G's losses on its fakes and latent vectors [2, b, latent].

        The anchor of the pair score is the embedding of x+ in D's last pass `d`: one step old,
        which saves a pass.
        """
        weights, score_real = self.config.losses, self.config.losses.objective in RELATIVISTIC
        d_fake, scores = discriminate_fakes(self.discriminator, fake, batch, noise, score_real)
        losses = {
            "adversarial": self.objective(scores, "generator"),
            "reconstruction": (
                reconstruction(fake.positive, batch.positive)
                + reconstruction(fake.negative, batch.negative)
            )
            / 2,
        }
        if weights.uniformity:
            losses["uniformity"] = uniformity(latents, batch.present)
        if weights.pair_confusion:
            anchor = d.real.positive.embedding.detach()
            right, wrong = d_fake.positive.embedding, d_fake.negative.embedding
            margin = pair_margin(anchor, right, wrong, weights.temperature)
            losses["pair_confusion"] = pair_confusion(margin)
        if self.config.condition == "classifier":
            losses["classification"] = auxiliary_classification(d_fake, batch.fake_labels)
        return losses

    def normalize(self, batch: PairBatch) -> PairBatch:
        """Convert the images of a batch to [-1, 1], [b, C, H, W]."""
        positive, partner, negative = (to_unit(images, self.dtype) for images in batch[:3])
        return batch._replace(positive=positive, partner=partner, negative=negative)

    def mixed_precision(self) -> torch.autocast:
        """Return the autocast context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    @torch.no_grad()
    def update_ema(self) -> None:
        """Update the EMA generator; the decay ramps up, to forget the first steps."""
        decay = min(self.config.optimizer.ema_decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.ema_generator.parameters()), self.g_params, 1 - decay)

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """Compute D's unit embeddings [n, e] of uint8 images [n, H, W, C]."""
        d = self.discriminator.eval()  # no update of spectral norm by this pass
        with self.mixed_precision():
            embeddings = d.embed(d.features(to_unit(images, self.dtype))).to(self.dtype)
        d.train()
        return embeddings

    def set_lr_scale(self, scale: float) -> None:
        """Set the learning rates to this fraction, 0 to 1, of the configured ones."""
        self.g_optimizer.set_lr_scale(scale)
        self.d_optimizer.set_lr_scale(scale)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on besides the config and the data."""
        state: dict[str, Any] = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return {**state, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict` exactly, also on another kind of device."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.steps = state["steps"]
        self._reset_cuda_graph()  # a captured graph reads the memory of the old optimizer state

    def _reset_cuda_graph(self) -> None:
        eager = self.update_networks
        self._update_networks = GraphedStep(eager) if self.use_cuda_graph else eager
