"""A naive training step: present pairs only, one pass of D for each image kind, loops for sums.

It shares only networks, views and random numbers with the package; these have their own tests.
"""

import copy
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from cl_ray.batch import FakeParts, PairBatch, RealParts
from cl_ray.data.views import ViewParams, apply_views, sample_views
from cl_ray.gan import ContrastiveGAN
from cl_ray.losses.penalties import rademacher, sample_rademacher
from cl_ray.muon import COEFFICIENTS, ITERATIONS
from cl_ray.rng import seeded_generator
from cl_ray.train_config import GANConfig, OptimizerConfig

SHAPE = (1, 28, 28)
Network = TypeVar("Network", bound=nn.Module)


class NaiveOptimizer:
    """Muon for matrices if `algorithm` says so, and Kingma and Ba (2015), algorithm 1."""

    def __init__(self, network: nn.Module, lr: float, decay: float, options: OptimizerConfig):
        self.parameters = list(network.parameters())
        self.embeddings = {m.weight for m in network.modules() if isinstance(m, nn.Embedding)}
        self.lr, self.decay, self.options, self.steps = lr, decay, options, 0
        self.m, self.v = ([torch.zeros_like(p) for p in self.parameters] for _ in range(2))

    def minimize(self, loss: Tensor) -> None:
        """Take one step; a parameter that the loss does not depend on has a gradient of 0."""
        zero = 0 * sum(p.sum() for p in self.parameters)
        gradients = torch.autograd.grad(loss + zero, self.parameters)
        beta1, beta2 = self.options.beta1, self.options.beta2
        self.steps += 1
        with torch.no_grad():
            for p, gradient, m, v in zip(self.parameters, gradients, self.m, self.v, strict=True):
                m.copy_(beta1 * m + (1 - beta1) * gradient)
                if self.options.algorithm == "muon" and p.ndim > 1 and p not in self.embeddings:
                    nesterov = (beta1 * m + (1 - beta1) * gradient).flatten(1)
                    update = newton_schulz(nesterov) * max(nesterov.shape) ** 0.5
                    p.sub_(self.lr * (update.view(p.shape) + self.decay * p))
                    continue
                v.copy_(beta2 * v + (1 - beta2) * gradient**2)
                m_hat = m / (1 - beta1**self.steps)
                v_hat = v / (1 - beta2**self.steps)
                p.sub_(self.lr * m_hat / (v_hat.sqrt() + 1e-8))


def newton_schulz(matrix: Tensor) -> Tensor:
    """Iterate on the whole matrix, as Jordan et al. (2024) do."""
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + 1e-8)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    return x


class NaiveGAN:
    """Starts from the weights of a float64 ContrastiveGAN that has taken no step."""

    def __init__(self, config: GANConfig, gan: ContrastiveGAN):
        def copy_network(network: Network) -> Network:
            return copy.deepcopy(network).to(memory_format=torch.contiguous_format)

        self.config, options = config, config.optimizer
        self.generator = copy_network(gan.generator)
        self.discriminator = copy_network(gan.discriminator)
        self.ema_generator = copy_network(gan.ema_generator)
        decays = options.weight_decay_g, options.weight_decay_d
        self.g_optimizer = NaiveOptimizer(self.generator, options.lr_g, decays[0], options)
        self.d_optimizer = NaiveOptimizer(self.discriminator, options.lr_d, decays[1], options)
        self.steps = 0

    def train_step(self, batch: PairBatch) -> dict[str, float]:
        """Take D's steps, then G's; returns each loss's mean over the present pairs."""
        optimizer, present = self.config.optimizer, batch.present[0]
        x = RealParts(*(self.normalize(i[present]) for i in (batch.positive, batch.negative)))
        partner = self.normalize(batch.partner[present])
        y: Sequence[Tensor | None] = (None, None)
        if batch.labels is not None:
            y = batch.labels[present].unbind(1)
        known = None
        if batch.labels is not None and batch.labelled is not None:
            known = batch.labelled[present].unbind(1)
            predicted = [self.class_logits(images).argmax(1) for images in x]
            columns = zip(batch.labels[present].unbind(1), predicted, known, strict=True)
            y = [label.where(k, other) for label, other, k in columns]
        for d_step in range(optimizer.d_steps):
            random = seeded_generator(self.config.seed, self.steps, d_step)
            z, *noise = torch.randn(
                3, len(present), self.config.generator.latent, generator=random
            ).double()[:, present]
            d_losses, anchor = self.d_step(x, partner, y, known, z, noise, present, random)
        g_losses = self.g_step(x, y, z, noise, present, random, anchor)
        decay = min(optimizer.ema_decay, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for ema, new in zip(
                self.ema_generator.parameters(), self.generator.parameters(), strict=True
            ):
                ema.copy_(decay * ema + (1 - decay) * new)
        self.steps += 1
        return {name: loss.item() for name, loss in (d_losses | g_losses).items()}

    def d_step(
        self,
        x: RealParts[Tensor],
        partner: Tensor,
        y: Sequence[Tensor | None],
        known: Sequence[Tensor] | None,
        z: Tensor,
        noise: Sequence[Tensor],
        present: Tensor,
        random: torch.Generator,
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Update D; returns its losses, and the embedding of x+ before the update."""
        weights, d = self.config.losses, self.discriminator
        tau, contrad = weights.temperature, weights.form == "contrad"
        view1, view2 = (
            apply_views(image, self.sample_views(present, random))
            for image in (x.positive, partner)
        )
        signs = rademacher(sample_rademacher(len(present), SHAPE, random)[present], SHAPE).double()
        alpha = torch.rand(len(present), generator=random).double()[present]
        detached = [f.detach() for f in self.generate(x, y, z, noise)]
        x, fake = self.augment([*x, *detached], present, random)
        labels = [*y, *y, y[0]]

        scores, embeddings = [], []
        for image, label in zip([*x, *fake, view1, view2], [*labels, y[0], y[0]], strict=True):
            features = d.features(image)
            scores.append(d.scores(features.detach() if contrad else features, label))
            embeddings.append(d.embed(features))
        real_scores, fake_scores = scores[:2], scores[2:5]
        anchor, right, wrong = embeddings[0], embeddings[2], embeddings[3]
        negatives = [] if contrad else embeddings[1:5]
        r1_features = d.features(x.positive + weights.r1_step * signs)
        perturbed = d.scores(r1_features.detach() if contrad else r1_features, y[0])
        between = torch.stack(
            [
                a * real + (1 - a) * f
                for a, real, f in zip(alpha, x.positive, fake.noise, strict=True)
            ]
        )
        losses = {
            "adversarial": D_OBJECTIVES[weights.objective](real_scores, fake_scores),
            "contrastive": info_nce(embeddings[5], embeddings[6], negatives, tau),
            "pair": -log_sigmoid(pair_margin(anchor, right, wrong, tau)).mean(),
            "approximate_r1": (((perturbed - scores[0]) / weights.r1_step) ** 2).mean() / 2,
            "r1": (self.gradient_norms(x.positive, y[0]) ** 2 / 2).mean(),
            "r2": (self.gradient_norms(fake.noise, y[0]) ** 2 / 2).mean(),
            "gradient_penalty": ((self.gradient_norms(between, y[0]) - 1) ** 2).mean(),
        }
        if contrad:
            losses["fake_supcon"] = self.fake_supcon(fake, [view1, view2])
        if self.config.condition == "classifier" and known is None:
            of_real, of_fake = self.cross_entropy(x, y), self.cross_entropy(fake, labels[2:])
            losses["classification"] = of_real + of_fake
        elif known is not None:
            shown, rows = [*x, view1, view2], [*known, known[0], known[0]]
            of_shown = [*y, y[0], y[0]]
            losses["classification"] = self.cross_entropy(
                [image[k] for image, k in zip(shown, rows, strict=True)],
                [label[k] for label, k in zip(of_shown, rows, strict=True) if label is not None],
            )
            losses["consistency"] = self.consistency(x.positive, [view1, view2], ~known[0])
        self.d_optimizer.minimize(sum(getattr(weights, n) * loss for n, loss in losses.items()))
        means = {"score/real": mean_of(real_scores), "score/fake": mean_of(fake_scores)}
        return {f"d/{name}": loss for name, loss in losses.items()} | means, anchor.detach()

    def g_step(
        self,
        x: RealParts[Tensor],
        y: Sequence[Tensor | None],
        z: Tensor,
        noise: Sequence[Tensor],
        present: Tensor,
        random: torch.Generator,
        anchor: Tensor,
    ) -> dict[str, Tensor]:
        """Update G; returns its losses."""
        weights, labels = self.config.losses, [*y, y[0]]
        fake = self.generate(x, y, z, noise)
        error = mean_of((f - i).abs().flatten() for f, i in zip(fake[:2], x, strict=True))
        uniform = uniformity([self.generator.encode(images) for images in x])
        x, fake = self.augment([*x, *fake], present, random)
        outputs = [self.discriminator(f, label) for f, label in zip(fake, labels, strict=True)]
        with torch.no_grad():
            real_scores = [
                self.discriminator(i, label).score for i, label in zip(x, y, strict=True)
            ]
        right, wrong, _ = (output.embedding for output in outputs)
        margin = pair_margin(anchor, right, wrong, weights.temperature)
        losses = {
            "adversarial": G_OBJECTIVES[weights.objective](real_scores, [o.score for o in outputs]),
            "reconstruction": error,
            "uniformity": uniform,
            "pair_confusion": -(log_sigmoid(margin) + log_sigmoid(-margin)).mean() / 2,
        }
        if self.config.condition == "classifier":
            losses["classification"] = self.cross_entropy(fake, labels)
        self.g_optimizer.minimize(sum(getattr(weights, n) * loss for n, loss in losses.items()))
        return {f"g/{name}": loss for name, loss in losses.items()}

    def normalize(self, stored: Tensor) -> Tensor:
        return (stored.double() / 127.5 - 1).permute(0, 3, 1, 2).contiguous()

    def sample_views(self, present: Tensor, random: torch.Generator) -> ViewParams:
        views = sample_views(self.config.views, len(present), random)
        return ViewParams(*(field.double()[present] for field in views))

    def augment(
        self, images: list[Tensor], present: Tensor, random: torch.Generator
    ) -> tuple[RealParts[Tensor], FakeParts[Tensor]]:
        """Augment x+, x- and the fakes by views sampled for all rows."""
        if self.config.augment.used:
            views = sample_views(self.config.augment, 5 * len(present), random)
            fields = [field.double().unflatten(0, (5, -1)) for field in views]
            images = [
                apply_views(image, ViewParams(*(field[part][present] for field in fields)))
                for part, image in enumerate(images)
            ]
        return RealParts(*images[:2]), FakeParts(*images[2:])

    def generate(
        self, x: RealParts[Tensor], y: Sequence[Tensor | None], z: Tensor, noise: Sequence[Tensor]
    ) -> FakeParts[Tensor]:
        g, std = self.generator, self.config.generator.latent_noise_std
        positive, negative = (
            g.decode(g.encode(image) + std * n, labels=label)
            for image, n, label in zip(x, noise, y, strict=True)
        )
        return FakeParts(positive, negative, g.decode(z, labels=y[0]))

    def fake_supcon(self, fake: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """ContraD's loss of fakes, query by query."""
        d, tau = self.discriminator, self.config.losses.temperature
        projection = d.fake_projection
        assert projection is not None

        def embed(parts: Sequence[Tensor]) -> list[Tensor]:
            return [e / e.norm() for part in parts for e in projection(d.features(part))]

        queries, real = embed(fake), embed(views)
        losses = []
        for i, query in enumerate(queries):
            same = [torch.dot(query, e) / tau for j, e in enumerate(queries) if j != i]
            other = [torch.dot(query, e) / tau for e in real]
            log_partition = torch.log(torch.exp(torch.stack(same + other)).sum())
            losses.append(log_partition - torch.stack(same).mean())
        return torch.stack(losses).mean()

    def cross_entropy(self, parts: Sequence[Tensor], labels: Sequence[Tensor | None]) -> Tensor:
        """-log softmax of the right class, image by image."""
        losses = []
        for images, part_labels in zip(parts, labels, strict=True):
            assert part_labels is not None
            for row, label in zip(self.class_logits(images), part_labels.tolist(), strict=True):
                losses.append(torch.log(torch.exp(row).sum()) - row[label])
        return torch.stack(losses).mean()

    def class_logits(self, images: Tensor) -> Tensor:
        return self.discriminator.classify(self.discriminator.features(images))

    def consistency(self, images: Tensor, views: Sequence[Tensor], rows: Tensor) -> Tensor:
        """FixMatch's loss of some rows, image by image."""
        losses = [torch.zeros((), dtype=torch.float64)]
        for row in rows.nonzero().flatten().tolist():
            probabilities = torch.exp(self.class_logits(images[row : row + 1]).detach()[0])
            probabilities = probabilities / probabilities.sum()
            if probabilities.max() >= self.config.losses.confidence:
                label = [probabilities.argmax()[None]]
                losses += [self.cross_entropy([v[row : row + 1]], label) / 2 for v in views]
        return torch.stack(losses).sum() / rows.sum()

    def gradient_norms(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """Norm of the gradient of D's score, image by image."""
        norms = []
        for number, image in enumerate(images):
            leaf = image.detach()[None].requires_grad_()
            label = None if labels is None else labels[number : number + 1]
            (gradient,) = torch.autograd.grad(
                self.discriminator(leaf, label).score[0], leaf, create_graph=True
            )
            norms.append(torch.sqrt((gradient**2).sum()))
        return torch.stack(norms)


def log_sigmoid(x: Tensor) -> Tensor:
    """Of scores of moderate size."""
    return -torch.log(1 + torch.exp(-x))


def mean_of(parts: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(parts)).mean()


def goodfellow(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    return -mean_of(map(log_sigmoid, real)) - mean_of(log_sigmoid(-s) for s in fake)


def pair_critic(real: Sequence[Tensor], fake: Sequence[Tensor]) -> Tensor:
    squares = mean_of(s**2 for s in real) + mean_of(s**2 for s in fake)
    return -(mean_of(fake[:2]) - fake[2].mean()) - (mean_of(real) - fake[2].mean()) + squares / 2


def relativistic(real: Sequence[Tensor], fake: Sequence[Tensor], sign: int) -> Tensor:
    opponents = zip((real[1], real[0], real[0]), fake, strict=True)
    return -mean_of(log_sigmoid(sign * (r - f)) for r, f in opponents)


NaiveObjective = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A player's loss of the scores of (x+, x-) and of the three fakes."""

D_OBJECTIVES: dict[str, NaiveObjective] = {
    "non-saturating": goodfellow,
    "minimax": goodfellow,
    "pair-critic": pair_critic,
    "hinge": lambda real, fake: (
        mean_of((1 - s).clamp(min=0) for s in real) + mean_of((1 + s).clamp(min=0) for s in fake)
    ),
    "least-squares": lambda real, fake: (
        mean_of((s - 1) ** 2 for s in real) / 2 + mean_of(s**2 for s in fake) / 2
    ),
    "wasserstein": lambda real, fake: mean_of(fake) - mean_of(real),
    "relativistic": lambda real, fake: relativistic(real, fake, 1),
}
G_OBJECTIVES: dict[str, NaiveObjective] = {
    "non-saturating": lambda real, fake: -mean_of(map(log_sigmoid, fake)),
    "minimax": lambda real, fake: mean_of(log_sigmoid(-s) for s in fake),
    "pair-critic": lambda real, fake: mean_of(fake[:2]) - fake[2].mean(),
    "hinge": lambda real, fake: -mean_of(fake),
    "least-squares": lambda real, fake: mean_of((s - 1) ** 2 for s in fake) / 2,
    "wasserstein": lambda real, fake: -mean_of(fake),
    "relativistic": lambda real, fake: relativistic(real, fake, -1),
}


def uniformity(parts: Sequence[Tensor]) -> Tensor:
    """Wang and Isola's uniformity, vector by vector."""
    directions = [z / z.norm() for part in parts for z in part]
    losses = []
    for i, own in enumerate(directions):
        others = [v for j, v in enumerate(directions) if j != i]
        potentials = [torch.exp(-2 * ((own - v) ** 2).sum()) for v in others]
        losses.append(torch.log(mean_of(potentials)))
    return torch.stack(losses).mean()


def pair_margin(anchor: Tensor, right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    return ((anchor * right).sum(1) - (anchor * wrong).sum(1)) / temperature


def info_nce(view1: Tensor, view2: Tensor, negatives: list[Tensor], temperature: float) -> Tensor:
    """InfoNCE, query by query."""
    losses = []
    for queries, positives in ((view1, view2), (view2, view1)):
        for i, query in enumerate(queries):
            keys = [queries[j] for j in range(len(queries)) if j != i]
            keys += [*positives, *(key for part in negatives for key in part)]
            similarities = torch.stack([torch.dot(query, key) / temperature for key in keys])
            right = torch.dot(query, positives[i]) / temperature
            losses.append(torch.log(torch.exp(similarities).sum()) - right)
    return torch.stack(losses).mean()
