"""The method: G, D, the EMA generator, and one training step.

For a pair (x+, x-), G gives the fakes G(x+), G(x-) and G(z). D separates real images from fakes,
classifies which of G(x+) and G(x-) was made from x+, and learns an embedding by InfoNCE on two
views of x+; a gradient penalty regularizes its score. G fools D, reconstructs the images, makes
G(x+) and G(x-) hard to tell apart, and spreads its latent vectors over the sphere. Every loss is a
mean over the global batch, and noise is drawn for it, so N workers take the same step as one.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cl_ray import distributed, forward
from cl_ray.batch import DiscriminatorInput, DiscriminatorPass, GeneratorOutput, Losses, PairBatch
from cl_ray.cuda_graph import GraphedStep
from cl_ray.errors import UserError
from cl_ray.losses.adversarial import OBJECTIVES, Scores
from cl_ray.losses.classification import auxiliary_classification, class_losses
from cl_ray.losses.config import RELATIVISTIC
from cl_ray.losses.contrastive import view_losses
from cl_ray.losses.pairwise import pair_classification, pair_confusion, pair_margin, reconstruction
from cl_ray.losses.penalties import discriminator_penalties
from cl_ray.losses.uniformity import uniformity
from cl_ray.networks.build import build_networks
from cl_ray.networks.normalize import to_unit
from cl_ray.optimizer import NetworkOptimizer, global_row_weights, update_ema, weighted_means
from cl_ray.step_noise import NoiseSampler, StepNoise
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
        placement: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            generator, discriminator = build_networks(config, shape, len(self.classes))
        self.generator = generator.to(**placement, memory_format=torch.channels_last)
        self.discriminator = discriminator.to(**placement, memory_format=torch.channels_last)
        distributed.broadcast([*generator.parameters(), *discriminator.parameters()])
        self.ema_generator = copy.deepcopy(generator).requires_grad_(False)
        self.use_cuda_graph = self.device.type == "cuda" and distributed.can_capture()
        self.g_optimizer = NetworkOptimizer(generator, "g", config, self.use_cuda_graph)
        self.d_optimizer = NetworkOptimizer(discriminator, "d", config, self.use_cuda_graph)
        self.objective = OBJECTIVES[config.losses.objective]
        self.steps = self.ema_steps = 0
        noise_dim = generator.decoder_noise_dim
        self._noise = NoiseSampler(config, shape, noise_dim, self.device, self.dtype)
        self._graphed_update = GraphedStep(self.update_networks, enabled=self.use_cuda_graph)

    def train_step(self, batch: PairBatch) -> Losses:
        """Take `d_steps` steps of D, then one step of G.

        Args:
            batch: This rank's pairs; the batches of all ranks together are the global batch.

        Returns:
            This rank's part of each loss and score; the sum over ranks is the global mean.
        """
        size = len(batch.positive)
        metrics = self._graphed_update(batch, self._noise.sample(self.steps, size))
        self._noise.prepare(self.steps + 1, size)
        # The decay ramps up, so that the first steps are forgotten.
        decay = min(self.config.optimizer.ema_decay, (1 + self.ema_steps) / (10 + self.ema_steps))
        update_ema(self.ema_generator, self.generator, decay)
        self.steps, self.ema_steps = self.steps + 1, self.ema_steps + 1
        return metrics

    def update_networks(self, batch: PairBatch, step_noise: list[StepNoise]) -> Losses:
        """Update D and G: a function of tensors only, which a CUDA graph can capture."""
        batch = forward.normalize_batch(batch, self.dtype)
        row_weights = global_row_weights(batch.present, self.dtype)
        with self.mixed_precision():
            batch = forward.predict_missing_labels(self.discriminator, batch)
        for noise in step_noise:
            is_last = noise is step_noise[-1]  # G learns from the last fakes
            with self.mixed_precision(), torch.set_grad_enabled(is_last):
                g = forward.generate(self.generator, batch, noise)
            with self.mixed_precision():
                seen = forward.discriminator_input(batch, g.fake, noise)
                d = forward.discriminate(self.discriminator, seen, batch)
                d = forward.gather_vectors(d, g, batch, self.config.losses)
                d_losses = self.discriminator_loss(d, seen, batch, noise)
            d_metrics = self.d_optimizer.minimize(d_losses, row_weights)
        with self.mixed_precision():
            g_losses = self.generator_loss(g, d, batch, noise)
        g_metrics = self.g_optimizer.minimize(g_losses, row_weights)
        return d_metrics | weighted_means(d.mean_scores(), row_weights) | g_metrics

    def discriminator_loss(
        self, d: DiscriminatorPass, seen: DiscriminatorInput, batch: PairBatch, noise: StepNoise
    ) -> Losses:
        """Compute D's losses from its output `d` on the images that it has `seen`."""
        options, tau = self.config.losses, self.config.losses.temperature
        losses = {"adversarial": self.objective(Scores.stack(d.fake, d.real), "discriminator")}
        losses |= view_losses(d.gathered, batch.present, tau)
        if options.pair:
            right, wrong = d.fake.positive.embedding, d.fake.negative.embedding
            margin = pair_margin(d.real.positive.embedding, right, wrong, tau)
            losses["pair"] = pair_classification(margin)
        if self.config.condition == "classifier":
            losses |= class_losses(d, batch, options)
        labels = None if batch.labels is None else batch.labels[:, 0]
        return losses | discriminator_penalties(
            self.discriminator, options, seen.real.positive, seen.fake.noise, noise.penalty, labels
        )

    def generator_loss(
        self, g: GeneratorOutput, d: DiscriminatorPass, batch: PairBatch, noise: StepNoise
    ) -> Losses:
        """Compute G's losses from its output `g`.

        The pair score's anchor, D's embedding of x+, is from D's pass `d` before its update: one
        step old, which saves a pass.
        """
        options, tau = self.config.losses, self.config.losses.temperature
        score_real = options.objective in RELATIVISTIC
        d_fake, scores = forward.discriminate_fakes(
            self.discriminator, g.fake, batch, noise, score_real
        )
        of_positive = reconstruction(g.fake.positive, batch.positive)
        of_negative = reconstruction(g.fake.negative, batch.negative)
        losses = {
            "adversarial": self.objective(scores, "generator"),
            "reconstruction": (of_positive + of_negative) / 2,
        }
        if options.uniformity:
            losses["uniformity"] = uniformity(d.gathered["latents"], batch.present)
        if options.pair_confusion:
            right, wrong = d_fake.positive.embedding, d_fake.negative.embedding
            margin = pair_margin(d.real.positive.embedding.detach(), right, wrong, tau)
            losses["pair_confusion"] = pair_confusion(margin)
        if self.config.condition == "classifier":
            losses["classification"] = auxiliary_classification(d_fake, batch.fake_labels)
        return losses

    def mixed_precision(self) -> torch.autocast:
        """Return the autocast context of a forward pass."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

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
        for optimizer in (self.g_optimizer, self.d_optimizer):
            optimizer.set_lr_scale(scale)

    def state_dict(self) -> dict[str, Any]:
        """Return all that the next step depends on besides the config and the data."""
        parts = {name: getattr(self, name).state_dict() for name in STATEFUL}
        return {**parts, "steps": self.steps, "ema_steps": self.ema_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict` exactly, also on another kind of device."""
        for name in STATEFUL:
            getattr(self, name).load_state_dict(state[name])
        self.steps, self.ema_steps = state["steps"], state.get("ema_steps", state["steps"])
        self._graphed_update.reset()  # graphs read the memory of the old optimizer state
