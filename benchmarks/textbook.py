"""The training step as a textbook writes it: `benchmarks/step.py` measures ours against it.

The same networks, losses and data; contiguous float32, plain Adam, and one pass of D for each batch
that it sees, as in PyTorch's DCGAN tutorial.
"""

import torch

from cl_ray.batch import PairBatch
from cl_ray.config import Config
from cl_ray.data.views import apply_views, sample_views
from cl_ray.losses.adversarial import OBJECTIVES, Scores
from cl_ray.losses.contrastive import info_nce
from cl_ray.losses.pairwise import pair_classification, pair_confusion, pair_margin, reconstruction
from cl_ray.losses.penalties import approximate_r1, rademacher, sample_rademacher
from cl_ray.losses.uniformity import uniformity
from cl_ray.networks.build import build_networks
from cl_ray.rng import seeded_generator


class TextbookGAN:
    """G and D without labels, in the form `info-nce`, with the approximate R1 penalty."""

    def __init__(self, config: Config, shape: tuple[int, int, int]):
        self.config, adam = config, config.optimizer
        self.g, self.d = build_networks(config, shape)
        self.ema_generator, _ = build_networks(config, shape)
        self.ema_generator.requires_grad_(False).load_state_dict(self.g.state_dict())
        betas = (adam.beta1, adam.beta2)
        self.g_optimizer = torch.optim.Adam(self.g.parameters(), adam.lr_g, betas, foreach=False)
        self.d_optimizer = torch.optim.Adam(self.d.parameters(), adam.lr_d, betas, foreach=False)
        self.steps = 0

    def train_step(self, batch: PairBatch) -> dict[str, float]:
        """Take one step of D and one of G; return their losses."""
        config, weights, tau = self.config, self.config.losses, self.config.losses.temperature
        objective, count = OBJECTIVES[weights.objective], len(batch.positive)
        random = seeded_generator(config.seed, self.steps, 0)
        z, *noise = torch.randn(3, count, config.generator.latent, generator=random)
        views = [sample_views(config.views, count, random) for _ in range(2)]
        x, partner, x_negative = (
            images.permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1
            for images in (batch.positive, batch.partner, batch.negative)
        )
        latents = torch.stack([self.g.encode(x), self.g.encode(x_negative)])
        fakes = [
            self.g.decode(latent + config.generator.latent_noise_std * n)
            for latent, n in zip(latents, noise, strict=True)
        ]
        fakes.append(self.g.decode(z))

        self.d_optimizer.zero_grad()
        real = [self.d(image) for image in (x, x_negative)]
        fake = [self.d(image.detach()) for image in fakes]
        view1, view2 = (
            self.d(apply_views(image, view)).embedding
            for image, view in zip((x, partner), views, strict=True)
        )
        scores = Scores(torch.stack([f.score for f in fake]), torch.stack([r.score for r in real]))
        negatives = [output.embedding for output in (real[1], *fake)]
        margin = pair_margin(real[0].embedding, fake[0].embedding, fake[1].embedding, tau)
        signs = rademacher(sample_rademacher(count, x.shape[1:], random), x.shape[1:])
        perturbed = self.d(x + weights.r1_step * signs).score
        d_loss = (
            weights.adversarial * objective(scores, "discriminator").mean()
            + weights.contrastive * info_nce(view1, view2, negatives, batch.present, tau).mean()
            + weights.pair * pair_classification(margin).mean()
            + weights.approximate_r1
            * approximate_r1(real[0].score, perturbed, weights.r1_step).mean()
        )
        d_loss.backward()
        self.d_optimizer.step()

        self.g_optimizer.zero_grad()
        fake = [self.d(image) for image in fakes]
        anchor = real[0].embedding.detach()
        margin = pair_margin(anchor, fake[0].embedding, fake[1].embedding, tau)
        error = (reconstruction(fakes[0], x) + reconstruction(fakes[1], x_negative)).mean() / 2
        scores = Scores(torch.stack([f.score for f in fake]))
        g_loss = (
            weights.adversarial * objective(scores, "generator").mean()
            + weights.reconstruction * error
            + weights.pair_confusion * pair_confusion(margin).mean()
            + weights.uniformity * uniformity(latents, batch.present).mean()
        )
        g_loss.backward()
        self.g_optimizer.step()
        self.steps += 1
        decay = min(config.optimizer.ema_decay, self.steps / (9 + self.steps))
        with torch.no_grad():
            for ema, p in zip(self.ema_generator.parameters(), self.g.parameters(), strict=True):
                ema.lerp_(p, 1 - decay)
        return {"d": d_loss.item(), "g": g_loss.item()}
