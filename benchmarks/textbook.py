"""The step as a textbook writes it: the same networks, losses and data, none of the care.

Contiguous float32, plain Adam, and one pass of D for each batch that it sees, as PyTorch's own
DCGAN tutorial does. `benchmarks/step.py` measures `Adversary.step` against it.
"""

import torch

from cl_ray.config import Config
from cl_ray.data.views import apply_views, sample_views
from cl_ray.gan import PairBatch
from cl_ray.losses.adversarial import OBJECTIVES, Scores
from cl_ray.losses.contrastive import info_nce
from cl_ray.losses.pairwise import pair_classification, pair_confusion, pair_margin, reconstruction
from cl_ray.losses.penalties import approximate_r1, rademacher, sample_rademacher
from cl_ray.losses.uniformity import uniformity
from cl_ray.networks.build import build_discriminator, build_generator
from cl_ray.rng import seeded_generator


class Textbook:
    """G against D, one pass after another."""

    def __init__(self, config: Config, shape: tuple[int, int, int]):
        self.config = config
        self.g = build_generator(shape, config.generator)
        self.d = build_discriminator(shape, config.discriminator)
        self.ema_generator = build_generator(shape, config.generator).requires_grad_(False)
        self.ema_generator.load_state_dict(self.g.state_dict())
        rates, betas = config.optimizer, (config.optimizer.beta1, config.optimizer.beta2)
        self.adam_g = torch.optim.Adam(self.g.parameters(), rates.lr_g, betas, foreach=False)
        self.adam_d = torch.optim.Adam(self.d.parameters(), rates.lr_d, betas, foreach=False)
        self.steps = 0

    def step(self, batch: PairBatch) -> dict[str, float]:
        """One step of D, one of G; returns its losses."""
        config, weights, tau = self.config, self.config.losses, self.config.losses.temperature
        objective = OBJECTIVES[weights.objective]
        random = seeded_generator(config.seed, self.steps, 0)
        count = len(batch.positive)
        z, *moves = torch.randn(3, count, config.generator.latent, generator=random)
        views = [sample_views(config.views, count, random) for _ in range(2)]
        x, partner, other = (
            images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
            for images in (batch.positive, batch.partner, batch.negative)
        )

        latents = torch.stack([self.g.encode(x), self.g.encode(other)])
        f_positive, f_negative = (
            self.g.decode(z + config.generator.latent_noise_std * move)
            for z, move in zip(latents, moves, strict=True)
        )
        f_noise = self.g.decode(z)
        fakes = (f_positive, f_negative, f_noise)
        self.adam_d.zero_grad()
        real_scores, real_embeddings = zip(*(self.d(i) for i in (x, other)), strict=True)
        fake_scores, fake_embeddings = zip(*(self.d(i.detach()) for i in fakes), strict=True)
        first, second = (
            self.d(apply_views(x, views[0]))[1],
            self.d(apply_views(partner, views[1]))[1],
        )
        scores = Scores(torch.stack(fake_scores), torch.stack(real_scores))
        others = torch.stack([real_embeddings[1], *fake_embeddings])
        margin = pair_margin(real_embeddings[0], fake_embeddings[0], fake_embeddings[1], tau)
        away = x + weights.r1_spread * rademacher(
            sample_rademacher(count, x.shape[1:], random), x.shape[1:]
        )
        slope = approximate_r1(real_scores[0], self.d(away)[0], weights.r1_spread)
        loss_d = (
            weights.adversarial * objective(scores, "discriminator").mean()
            + weights.contrastive * info_nce(first, second, others, batch.present, tau).mean()
            + weights.pair * pair_classification(margin).mean()
            + weights.approximate_r1 * slope.mean()
        )
        loss_d.backward()
        self.adam_d.step()

        self.adam_g.zero_grad()
        fake_scores, fake_embeddings = zip(*(self.d(i) for i in fakes), strict=True)
        anchor = real_embeddings[0].detach()
        margin = pair_margin(anchor, fake_embeddings[0], fake_embeddings[1], tau)
        error = (
            reconstruction(f_positive, x).mean() + reconstruction(f_negative, other).mean()
        ) / 2
        loss_g = (
            weights.adversarial * objective(Scores(torch.stack(fake_scores)), "generator").mean()
            + weights.reconstruction * error
            + weights.pair_confusion * pair_confusion(margin).mean()
            + weights.uniformity * uniformity(latents, batch.present).mean()
        )
        loss_g.backward()
        self.adam_g.step()
        self.steps += 1
        decay = min(config.optimizer.average, self.steps / (9 + self.steps))
        with torch.no_grad():
            for ours, theirs in zip(
                self.ema_generator.parameters(), self.g.parameters(), strict=True
            ):
                ours.mul_(decay).add_(theirs, alpha=1 - decay)
        return {"d": loss_d.item(), "g": loss_g.item()}
