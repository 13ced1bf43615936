"""One step of the method as its documents say it, and nothing else.

Present pairs only, one kind of image a pass, losses as sums written out, Adam by hand. It takes
from the package the networks, the views and the source of chance, which have tests of their own.
"""

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn

from cl_ray.config import Config
from cl_ray.data.views import ViewParams, apply_views, sample_views
from cl_ray.gan import ContrastiveGAN, PairBatch
from cl_ray.losses.penalties import rademacher, sample_rademacher
from cl_ray.rng import seeded_generator


class Adam:
    """Kingma and Ba (2015), algorithm 1."""

    def __init__(self, weights: list[nn.Parameter], rate: float, beta1: float, beta2: float):
        self.weights, self.rate, self.beta1, self.beta2 = weights, rate, beta1, beta2
        self.first = [torch.zeros_like(w) for w in weights]
        self.second = [torch.zeros_like(w) for w in weights]
        self.steps = 0

    def descend(self, loss: Tensor) -> None:
        """One step down a loss; a weight that it does not depend on has a gradient of 0."""
        gradients = torch.autograd.grad(loss + 0 * sum(w.sum() for w in self.weights), self.weights)
        self.steps += 1
        with torch.no_grad():
            for weight, gradient, m, v in zip(
                self.weights, gradients, self.first, self.second, strict=True
            ):
                m.copy_(self.beta1 * m + (1 - self.beta1) * gradient)
                v.copy_(self.beta2 * v + (1 - self.beta2) * gradient**2)
                m_hat = m / (1 - self.beta1**self.steps)
                v_hat = v / (1 - self.beta2**self.steps)
                weight -= self.rate * m_hat / (v_hat.sqrt() + 1e-8)


class Plain:
    """Goes on from where a float64 gan that has not begun yet stands."""

    def __init__(self, config: Config, gan: ContrastiveGAN):
        def copied(network: nn.Module) -> nn.Module:
            return copy.deepcopy(network).to(memory_format=torch.contiguous_format)

        self.config = config
        self.generator = copied(gan.generator)
        self.discriminator = copied(gan.discriminator)
        self.ema_generator = copied(gan.ema_generator)
        rates = config.optimizer
        betas = rates.beta1, rates.beta2
        self.adam_g = Adam(list(self.generator.parameters()), rates.lr_g, *betas)
        self.adam_d = Adam(list(self.discriminator.parameters()), rates.lr_d, *betas)
        self.steps = 0

    def step(self, batch: PairBatch) -> dict[str, float]:
        """D's steps, then G's; returns each term's mean over the pairs that are present."""
        weights, optimizer = self.config.losses, self.config.optimizer
        tau, terms = weights.temperature, {}

        def images(stored: Tensor) -> Tensor:
            unit = stored[batch.present].double() / 127.5 - 1
            return unit.permute(0, 3, 1, 2).contiguous()

        x_positive, x_partner, x_negative = map(
            images, (batch.positive, batch.partner, batch.negative)
        )
        y_positive = y_negative = None
        if batch.labels is not None:
            y_positive, y_negative = batch.labels[batch.present].T
        for turn in range(optimizer.d_steps):
            random = seeded_generator(self.config.seed, self.steps, turn)
            noise, m_positive, m_negative = torch.randn(
                3, len(batch.present), self.config.generator.latent, generator=random
            ).double()[:, batch.present]
            views = [self.views(batch.present, random) for _ in range(2)]
            directions = sample_rademacher(len(batch.present), (1, 28, 28), random)[batch.present]
            f_positive, f_negative, f_noise = self.fakes(
                (x_positive, m_positive, y_positive), (x_negative, m_negative, y_negative), noise
            )

            share = torch.rand(len(batch.present), generator=random).double()[batch.present]
            t_x_positive, t_x_negative, t_f_positive, t_f_negative, t_f_noise = self.shown(
                [x_positive, x_negative, *(f.detach() for f in (f_positive, f_negative, f_noise))],
                batch.present,
                random,
            )
            of_next = random.get_state()
            s_x_positive, anchor = self.judged(t_x_positive, y_positive)
            s_x_negative, e_x_negative = self.judged(t_x_negative, y_negative)
            s_f_positive, e_f_positive = self.judged(t_f_positive, y_positive)
            s_f_negative, e_f_negative = self.judged(t_f_negative, y_negative)
            s_f_noise, e_f_noise = self.judged(t_f_noise, y_positive)
            seen_first, seen_second = (
                apply_views(x_positive, views[0]),
                apply_views(x_partner, views[1]),
            )
            e_first = self.judged(seen_first, y_positive)[1]
            e_second = self.judged(seen_second, y_positive)[1]

            real_scores = s_x_positive, s_x_negative
            fake_scores = s_f_positive, s_f_negative, s_f_noise
            told = TOLD[weights.objective](real_scores, fake_scores)
            others = [e_x_negative, e_f_positive, e_f_negative, e_f_noise]
            terms["d/fakes"] = torch.zeros(())
            if weights.form == "contrad":
                others = []
                terms["d/fakes"] = self.fakes_together(
                    [t_f_positive, t_f_negative, t_f_noise], [seen_first, seen_second]
                )
            drawn = drawn_together(e_first, e_second, others, tau)
            picked = -log_sigmoid(margin(anchor, e_f_positive, e_f_negative, tau)).mean()
            terms["d/adversarial"] = told
            terms["d/contrastive"] = drawn
            terms["d/pair"] = picked
            terms["score/real"] = (s_x_positive.mean() + s_x_negative.mean()) / 2
            terms["score/fake"] = sum(s.mean() for s in (s_f_positive, s_f_negative, s_f_noise)) / 3
            step = weights.r1_spread * rademacher(directions, (1, 28, 28)).double()
            beside = self.judged(t_x_positive + step, y_positive)[0]
            slope = (beside - s_x_positive) / weights.r1_spread
            terms["d/approximate_r1"] = (slope**2).mean() / 2
            terms["d/classification"] = torch.zeros(())
            if self.config.condition == "classifier":
                seen = [(t_x_positive, y_positive), (t_x_negative, y_negative)]
                made = [
                    (t_f_positive, y_positive), (t_f_negative, y_negative), (t_f_noise, y_positive)
                ]  # fmt: skip
                terms["d/classification"] = self.unnamed(seen) + self.unnamed(made)
            mixed = torch.stack(
                [
                    t * x + (1 - t) * f
                    for t, x, f in zip(share, t_x_positive, t_f_noise, strict=True)
                ]
            )
            penalties = {
                "r1": (self.slopes(t_x_positive, y_positive) ** 2 / 2).mean(),
                "r2": (self.slopes(t_f_noise, y_positive) ** 2 / 2).mean(),
                "gradient_penalty": ((self.slopes(mixed, y_positive) - 1) ** 2).mean(),
            }
            terms |= {f"d/{name}": term for name, term in penalties.items()}
            self.adam_d.descend(
                weights.adversarial * told
                + sum(getattr(weights, name) * term for name, term in penalties.items())
                + weights.contrastive * drawn
                + weights.pair * picked
                + weights.approximate_r1 * terms["d/approximate_r1"]
                + weights.classification * terms["d/classification"]
                + weights.fakes * terms["d/fakes"]
            )

        f_positive, f_negative, f_noise = self.fakes(
            (x_positive, m_positive, y_positive), (x_negative, m_negative, y_negative), noise
        )
        random.set_state(of_next)
        t_x_positive, t_x_negative, t_f_positive, t_f_negative, t_f_noise = self.shown(
            [x_positive, x_negative, f_positive, f_negative, f_noise], batch.present, random
        )
        s_f_positive, e_f_positive = self.discriminator(t_f_positive, y_positive)
        s_f_negative, e_f_negative = self.discriminator(t_f_negative, y_negative)
        s_f_noise, _ = self.discriminator(t_f_noise, y_positive)
        with torch.no_grad():
            pairs = (t_x_positive, y_positive), (t_x_negative, y_negative)
            real_scores = [self.discriminator(x, y)[0] for x, y in pairs]
        fooled = FOOLED[weights.objective](real_scores, (s_f_positive, s_f_negative, s_f_noise))
        near = ((f_positive - x_positive).abs().mean() + (f_negative - x_negative).abs().mean()) / 2
        gap = margin(anchor.detach(), e_f_positive, e_f_negative, tau)  # by D before its last step
        hidden = -(log_sigmoid(gap) + log_sigmoid(-gap)).mean() / 2
        terms["g/adversarial"] = fooled
        terms["g/reconstruction"] = near
        terms["g/pair_confusion"] = hidden
        terms["g/uniformity"] = uneven(
            [self.generator.encode(images) for images in (x_positive, x_negative)]
        )
        terms["g/classification"] = torch.zeros(())
        if self.config.condition == "classifier":
            terms["g/classification"] = self.unnamed(
                [(t_f_positive, y_positive), (t_f_negative, y_negative), (t_f_noise, y_positive)]
            )
        self.adam_g.descend(
            weights.classification * terms["g/classification"]
            + weights.adversarial * fooled
            + weights.reconstruction * near
            + weights.pair_confusion * hidden
            + weights.uniformity * terms["g/uniformity"]
        )

        decay = min(optimizer.average, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            for old, new in zip(
                self.ema_generator.parameters(), self.generator.parameters(), strict=True
            ):
                old.copy_(decay * old + (1 - decay) * new)
        self.steps += 1
        return {name: term.item() for name, term in terms.items()}

    def views(self, present: Tensor, random: torch.Generator) -> ViewParams:
        """Views drawn for all rows, of which the present are kept."""
        drawn = sample_views(self.config.views, len(present), random)
        return ViewParams(*(part.double()[present] for part in drawn))

    def shown(self, images: list[Tensor], present: Tensor, random: torch.Generator) -> list[Tensor]:
        """Five kinds of images through views drawn for all rows, of which the present are kept."""
        if not self.config.augment.used:
            return images
        drawn = sample_views(self.config.augment, 5 * len(present), random)
        kinds = [part.double().view(5, len(present), *part.shape[1:]) for part in drawn]
        return [
            apply_views(x, ViewParams(*(kind[n][present] for kind in kinds)))
            for n, x in enumerate(images)
        ]

    def judged(self, images: Tensor, labels: Tensor | None) -> tuple[Tensor, Tensor]:
        """D in its own step: in the form contrad its features learn nothing from the score."""
        d = self.discriminator
        if self.config.losses.form != "contrad":
            return d(images, labels)
        features = d.features(images)
        return d.scores(features.detach(), labels), d.embed(features)

    def fakes_together(self, fakes: Sequence[Tensor], views: Sequence[Tensor]) -> Tensor:
        """Supervised contrastion of fakes, by the second projection, query by query."""
        d, tau = self.discriminator, self.config.losses.temperature

        def unit(several: Sequence[Tensor]) -> list[Tensor]:
            return [z / z.norm() for x in several for z in d.second(d.features(x))]

        made, real = unit(fakes), unit(views)
        losses = []
        for i, query in enumerate(made):
            alike = [torch.dot(query, z) / tau for j, z in enumerate(made) if j != i]
            others = [torch.dot(query, z) / tau for z in real]
            whole = torch.log(torch.exp(torch.stack(alike + others)).sum())
            losses.append(whole - torch.stack(alike).mean())
        return torch.stack(losses).mean()

    def fakes(
        self,
        positive: tuple[Tensor, Tensor, Tensor | None],
        negative: tuple[Tensor, Tensor, Tensor | None],
        noise: Tensor,
    ) -> list[Tensor]:
        """f+ and f-, each of images, what moves their latent vectors and classes, and fz."""
        g, latent_noise_std = self.generator, self.config.generator.latent_noise_std
        made = [
            g.decode(g.encode(x) + latent_noise_std * m, labels=y)
            for x, m, y in (positive, negative)
        ]
        return [*made, g.decode(noise, labels=positive[2])]

    def unnamed(self, seen: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
        """-log of the share that D's softmax gives the right class, image by image."""
        losses = []
        for images, labels in seen:
            assert labels is not None
            logits = self.discriminator.classify(self.discriminator.features(images))
            for row, label in zip(logits, labels.tolist(), strict=True):
                losses.append(torch.log(torch.exp(row).sum()) - row[label])
        return torch.stack(losses).mean()

    def slopes(self, images: Tensor, labels: Tensor | None) -> Tensor:
        """The length of the gradient of D's score, image by image."""
        lengths = []
        for number, image in enumerate(images):
            leaf = image.detach()[None].requires_grad_()
            label = None if labels is None else labels[number : number + 1]
            score = self.discriminator(leaf, label)[0][0]
            (slope,) = torch.autograd.grad(score, leaf, create_graph=True)
            lengths.append(torch.sqrt((slope**2).sum()))
        return torch.stack(lengths)


def log_sigmoid(x: Tensor) -> Tensor:
    """Of scores of moderate size."""
    return -torch.log(1 + torch.exp(-x))


Told = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""A player's loss, given the scores of x+, x- and of f+, f-, fz."""


def mean_of(scores: Iterable[Tensor]) -> Tensor:
    """Over all parts and pairs."""
    return torch.stack(list(scores)).mean()


def critic(x: Sequence[Tensor], f: Sequence[Tensor]) -> Tensor:
    """D's loss of the objective `pair-critic`."""
    squares = mean_of(s**2 for s in x) + mean_of(s**2 for s in f)
    return -(mean_of(f[:2]) - f[2].mean()) - (mean_of(x) - f[2].mean()) + squares / 2


def entropy(x: Sequence[Tensor], f: Sequence[Tensor]) -> Tensor:
    """D's loss of Goodfellow's objectives."""
    return -mean_of(map(log_sigmoid, x)) - mean_of(log_sigmoid(-s) for s in f)


TOLD: dict[str, Told] = {
    "non-saturating": entropy,
    "minimax": entropy,
    "pair-critic": critic,
    "hinge": lambda x, f: (
        mean_of((1 - s).clamp(min=0) for s in x) + mean_of((1 + s).clamp(min=0) for s in f)
    ),
    "least-squares": lambda x, f: (
        mean_of((s - 1) ** 2 for s in x) / 2 + mean_of(s**2 for s in f) / 2
    ),
    "wasserstein": lambda x, f: mean_of(f) - mean_of(x),
    "relativistic": lambda x, f: (
        -mean_of(log_sigmoid(real - fake) for real, fake in zip((x[1], x[0], x[0]), f, strict=True))
    ),
}
FOOLED: dict[str, Told] = {
    "non-saturating": lambda x, f: -mean_of(map(log_sigmoid, f)),
    "minimax": lambda x, f: mean_of(log_sigmoid(-s) for s in f),
    "pair-critic": lambda x, f: mean_of(f[:2]) - f[2].mean(),
    "hinge": lambda x, f: -mean_of(f),
    "least-squares": lambda x, f: mean_of((s - 1) ** 2 for s in f) / 2,
    "wasserstein": lambda x, f: -mean_of(f),
    "relativistic": lambda x, f: (
        -mean_of(log_sigmoid(fake - real) for real, fake in zip((x[1], x[0], x[0]), f, strict=True))
    ),
}


def uneven(parts: Sequence[Tensor]) -> Tensor:
    """Wang and Isola's uniformity of latent vectors, vector by vector."""
    directions = [z / z.norm() for part in parts for z in part]
    losses = []
    for i, own in enumerate(directions):
        others = [v for j, v in enumerate(directions) if j != i]
        potentials = torch.stack([torch.exp(-2 * ((own - v) ** 2).sum()) for v in others])
        losses.append(torch.log(potentials.mean()))
    return torch.stack(losses).mean()


def margin(anchor: Tensor, right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """How much nearer the right fake is to the anchor."""
    return ((anchor * right).sum(1) - (anchor * wrong).sum(1)) / temperature


def drawn_together(
    first: Tensor, second: Tensor, others: list[Tensor], temperature: float
) -> Tensor:
    """InfoNCE, query by query."""
    losses = []
    for queries, positives in ((first, second), (second, first)):
        for i, query in enumerate(queries):
            keys = [queries[j] for j in range(len(queries)) if j != i]
            keys += [*positives, *(key for other in others for key in other)]
            likenesses = torch.stack([torch.dot(query, key) / temperature for key in keys])
            right = torch.dot(query, positives[i]) / temperature
            losses.append(torch.log(torch.exp(likenesses).sum()) - right)
    return torch.stack(losses).mean()
