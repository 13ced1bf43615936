"""The method: G, D, the EMA generator, two optimisers, and one step.

For a pair (x+, x-): f+ = G(x+), f- = G(x-), fz = G(z). D tells {x+, x-} from {f+, f-, fz}, picks
which of f+ and f- came from x+, and draws two views of x+ together in its embedding, away from
x-, the rest of the batch and the fakes; its score stays smooth at x+. G fools D, stays near x,
hides f+ from f-, and spreads its latent vectors evenly. If labels are used, a fake of an image
is made as one of that image's class, fz as one of x+'s, so that its classes are the data's.

Noise and views are drawn for the global batch from (seed, step) and each rank takes its rows;
every loss is a mean over the global batch. So N workers take the step of one.
"""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.cuda_graph import GraphedStep, set_lr
from cl_ray.data.views import ViewParams, apply_views
from cl_ray.errors import UserError
from cl_ray.losses.adversarial import OBJECTIVES, RELATIVISTIC, Scores
from cl_ray.losses.classification import auxiliary_classification
from cl_ray.losses.contrastive import fake_supcon, info_nce
from cl_ray.losses.pairwise import pair_classification, pair_confusion, pair_margin, reconstruction
from cl_ray.losses.penalties import (
    approximate_r1,
    gradient_penalty,
    input_gradient,
    interpolate,
    rademacher,
    zero_centered_penalty,
)
from cl_ray.losses.uniformity import uniformity
from cl_ray.networks.build import build_networks
from cl_ray.networks.normalize import to_unit
from cl_ray.rng import StepNoise, sample_step_noise
from cl_ray.train_config import GANConfig

LossTerms = dict[str, Tensor]
"""A figure of each of a rank's b pairs, [b], by name."""
Update = Callable[["PairBatch", list[StepNoise]], LossTerms]
"""`Adversary._update`, as it is or recorded."""

WHOSE = (0, 1, 0, 1, 0, 0, 0)
"""Of which image of the pair each part of what D sees has the class: x+, x-, f+, f-, fz, views."""


class PairBatch(NamedTuple):
    """One rank's b pairs, uint8 [b, H, W, C] each.

    Args:
        positive: x+.
        partner: What is seen in x+'s other view: x+ again, or another image of its class.
        negative: x-.
        present: Bool [b]; false rows only fill the last batch up and count for nothing.
        labels: Classes of x+ and x-, int64 [b, 2]; None where labels are not used.
    """

    positive: Tensor
    partner: Tensor
    negative: Tensor
    present: Tensor
    labels: Tensor | None = None

    @property
    def classes(self) -> Tensor | None:
        """Of each part of what D sees, in its order, [7, b]."""
        if self.labels is None:
            return None
        return torch.stack([self.labels[:, whose] for whose in WHOSE])


class DiscriminatorOutput(NamedTuple):
    """What D makes of images, part by part.

    Args:
        scores: [parts, b].
        embeddings: [parts, b, e].
        logits: Of the classes, [parts, b, classes]; None unless D is to name them.
        second: Embeddings in which fakes are one class, [parts, b, e]; None but in ContraD's form.
    """

    scores: Tensor
    embeddings: Tensor
    logits: Tensor | None
    second: Tensor | None


class ContrastiveGAN:
    """G against D.

    Args:
        config: The config tree; of it networks, losses, views, optimisers and the seed.
        shape: Height, width and channels of an image.
        device: Where to compute.
        dtype: Of weights and computation; torch.bfloat16 means float32 weights under autocast.
        classes: The names of the labels, if `config.condition` uses them.

    Raises:
        UserError: Classes are missing, or given where labels are not used.
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
                f"condition {config.condition!r} goes with {len(self.classes)} classes: give "
                "`classes`, the names of the labels, with a condition and only then."
            )
        self.autocast = dtype == torch.bfloat16
        self.dtype = torch.float32 if self.autocast else dtype
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            generator, discriminator = build_networks(config, shape, len(self.classes))
        self.layout: dict[str, Any] = {"device": self.device, "dtype": self.dtype}
        self.generator = generator.to(**self.layout, memory_format=torch.channels_last)
        self.discriminator = discriminator.to(**self.layout, memory_format=torch.channels_last)
        self.g_params = list(self.generator.parameters())
        self.d_params = list(self.discriminator.parameters())
        distributed.broadcast([*self.g_params, *self.d_params])
        self.ema_generator = copy.deepcopy(self.generator).requires_grad_(False)
        optimizer = config.optimizer
        self.use_cuda_graph = self.device.type == "cuda" and distributed.world()[1] == 1
        """Whether steps are recorded as a CUDA graph."""
        adam: dict[str, Any] = {
            "betas": (optimizer.beta1, optimizer.beta2),
            "fused": self.device.type in ("cpu", "cuda"),
            "capturable": self.use_cuda_graph,
        }

        def rate(value: float) -> float | Tensor:
            """A recorded step reads it where it lies."""
            return torch.tensor(value, device=self.device) if self.use_cuda_graph else value

        self.g_optimizer = torch.optim.Adam(self.g_params, rate(optimizer.lr_g), **adam)
        self.d_optimizer = torch.optim.Adam(self.d_params, rate(optimizer.lr_d), **adam)
        self.objective = OBJECTIVES[config.losses.objective]
        self.update: Update = self._fresh_update()
        self.steps = 0

    def step(self, batch: PairBatch) -> LossTerms:
        """`d_steps` steps of D, then one of G.

        Args:
            batch: This rank's pairs; the ranks' batches together are the global batch.

        Returns:
            This rank's share of each figure, scalars; their sum over ranks is the global mean.
        """
        config, extras = self.config, self.generator.extras
        chances = [
            sample_step_noise(
                config, self.shape, extras, self.steps, turn, len(batch.present), **self.layout
            )
            for turn in range(config.optimizer.d_steps)
        ]
        terms = self.update(batch, chances)
        self._average()
        self.steps += 1
        return terms

    def _update(self, batch: PairBatch, chances: list[StepNoise]) -> LossTerms:
        """The step itself, a function of tensors alone, with one `Chance` for each turn of D."""
        positive, partner, negative = (
            to_unit(images, self.dtype)
            for images in (batch.positive, batch.partner, batch.negative)
        )
        images = torch.cat([positive, negative])
        present = batch.present.to(self.dtype)
        share = present / distributed.sum_over_ranks(present.sum())  # [b]; 0 for absent rows
        of_fakes = None if batch.classes is None else batch.classes[2:5].flatten()
        for drawn in chances:
            last = drawn is chances[-1]  # G learns from the last fakes
            with self._cast(), torch.set_grad_enabled(last):
                fakes, latents = self.generator(
                    images, drawn.noise, drawn.moves, drawn.extras, of_fakes
                )
            shown = self._show(torch.cat([images, fakes.detach().to(self.dtype)]), drawn.shown)
            real, _, _, _, made = shown.chunk(5)
            seen = [shown]
            if self.config.losses.of_views:
                seen += [apply_views(positive, drawn.first), apply_views(partner, drawn.second)]
            with self._cast():
                d_terms, anchor = self._judge(torch.cat(seen), batch)
            d_terms |= self._penalties(real, made, drawn, batch.classes)
            self._descend(self.d_optimizer, self.d_params, d_terms, share)
        with self._cast():
            g_terms = self._fool(images, fakes, latents, anchor, batch, drawn.shown_next)
        self._descend(self.g_optimizer, self.g_params, g_terms, share)
        return {name: (term.detach() * share).sum() for name, term in (d_terms | g_terms).items()}

    def _fresh_update(self) -> Update:
        return GraphedStep(self._update) if self.use_cuda_graph else self._update

    @torch.no_grad()
    def embed(self, images: Tensor) -> Tensor:
        """D's unit embeddings [n, e] of uint8 images [n, H, W, C], as it is now."""
        d = self.discriminator.eval()  # spectral norm estimates nothing from this pass
        with self._cast():
            embeddings = d.embed(d.features(to_unit(images, self.dtype))).to(self.dtype)
        d.train()
        return embeddings

    def set_lr_scale(self, share: float) -> None:
        """Take the next steps at this share, 0 to 1, of the configured learning rates."""
        rates = self.config.optimizer
        for optimizer, rate in ((self.g_optimizer, rates.lr_g), (self.d_optimizer, rates.lr_d)):
            for group in optimizer.param_groups:
                set_lr(group, share * rate)

    def _judge(self, seen: Tensor, batch: PairBatch) -> tuple[LossTerms, Tensor]:
        """D's terms, and its embedding of x+, out of one pass over all that D sees."""
        weights, classes = self.config.losses, batch.classes
        parts = len(seen) // len(batch.present)
        every = None if classes is None else classes[:parts]
        contrad = weights.form == "contrad"
        s, e, logits, e2 = self._score(seen, parts, every, apart=contrad)
        real, fake = s[:2], s[2:5]
        anchor, _, f_positive, f_negative = e[:4]
        terms = {"d/adversarial": self.objective(Scores(fake, real), "discriminator")}
        if weights.contrastive:
            others = e[:0] if contrad else e[1:5]  # x- and the fakes
            terms["d/contrastive"] = info_nce(
                e[5], e[6], others, batch.present, weights.temperature
            )
        if e2 is not None:
            terms["d/fakes"] = fake_supcon(
                e2[2:5], e2[5], e2[6], batch.present, weights.temperature
            )
        if weights.pair:
            terms["d/pair"] = pair_classification(
                pair_margin(anchor, f_positive, f_negative, weights.temperature)
            )
        if logits is not None and every is not None:
            of_real, of_fake = slice(0, 2), slice(2, 5)
            terms["d/classification"] = auxiliary_classification(
                logits[of_real], every[of_real]
            ) + auxiliary_classification(logits[of_fake], every[of_fake])
        terms |= {"score/real": real.mean(0), "score/fake": fake.mean(0)}
        return terms, anchor.detach()

    def _penalties(
        self, real: Tensor, fake: Tensor, drawn: StepNoise, classes: Tensor | None
    ) -> LossTerms:
        """D's penalties, in full precision, at x+ and fz [b, C, H, W] each."""
        weights, terms, d = self.config.losses, {}, self.discriminator
        labels = None if classes is None else classes[0]  # fz has x+'s

        def slope(images: Tensor) -> Tensor:
            return input_gradient(lambda x: d.scores(d.features(x), labels), images.to(self.dtype))

        if weights.approximate_r1:  # in one pass: spectral norm may change between two
            step = weights.r1_spread * rademacher(drawn.signs, real.shape[1:]).to(self.dtype)
            features = d.features(torch.cat([real, real + step]))
            if weights.form == "contrad":
                features = features.detach()
            twice = None if labels is None else labels.repeat(2)
            here, there = d.scores(features, twice).chunk(2)
            terms["d/approximate_r1"] = approximate_r1(here, there, weights.r1_spread)
        if weights.r1:
            terms["d/r1"] = zero_centered_penalty(slope(real))
        if weights.r2:
            terms["d/r2"] = zero_centered_penalty(slope(fake))
        if weights.gradient_penalty:
            points = interpolate(real, fake.to(self.dtype), drawn.shares)
            terms["d/gradient_penalty"] = gradient_penalty(slope(points))
        return terms

    def _fool(
        self,
        images: Tensor,
        fakes: Tensor,
        latents: Tensor,
        anchor: Tensor,
        batch: PairBatch,
        views: ViewParams | None,
    ) -> LossTerms:
        """G's terms; `anchor`, D's embedding of x+, is one step of D old, which saves a pass."""
        weights, classes, present = self.config.losses, batch.classes, batch.present
        of_images, of_fakes = (None, None) if classes is None else (classes[:2], classes[2:5])
        fakes, real = fakes.to(self.dtype), None
        of_real, of_made = (None, None) if views is None else views.split(len(images))
        fake, (f_positive, f_negative, _), logits, _ = self._score(
            self._show(fakes, of_made), 3, of_fakes
        )
        if weights.objective in RELATIVISTIC:
            with torch.no_grad():
                real = self._score(self._show(images, of_real), 2, of_images).scores
        error = reconstruction(fakes[: len(images)], images)
        terms = {
            "g/adversarial": self.objective(Scores(fake, real), "generator"),
            "g/reconstruction": error.view(2, -1).mean(0),
        }
        if weights.uniformity:
            terms["g/uniformity"] = uniformity(
                latents.to(self.dtype).view(2, len(present), -1), present
            )
        if weights.pair_confusion:
            margin = pair_margin(anchor, f_positive, f_negative, weights.temperature)
            terms["g/pair_confusion"] = pair_confusion(margin)
        if logits is not None and of_fakes is not None:
            terms["g/classification"] = auxiliary_classification(logits, of_fakes)
        return terms

    def _score(
        self, images: Tensor, parts: int, labels: Tensor | None, apart: bool = False
    ) -> DiscriminatorOutput:
        """D of [parts b, C, H, W], as of classes [parts, b].

        With `apart`, the features learn nothing from the scores, and get their second projection
        (ContraD: Jeong and Shin, 2021, section 3).
        """

        def by_part(found: Tensor) -> Tensor:
            return found.to(self.dtype).view(parts, len(images) // parts, *found.shape[1:])

        d, weights = self.discriminator, self.config.losses
        features = d.features(images)
        kinds = None if labels is None else labels.flatten()
        named = self.config.condition == "classifier" and weights.classification > 0
        return DiscriminatorOutput(
            by_part(d.scores(features.detach() if apart else features, kinds)),
            by_part(d.embed(features)),
            by_part(d.classify(features)) if named else None,
            by_part(d.embed_fakes(features)) if apart and weights.fakes else None,
        )

    def _show(self, images: Tensor, views: ViewParams | None) -> Tensor:
        """Images as D sees them (differentiable augmentation: Zhao et al., 2020, section 3)."""
        if views is None:
            return images
        with torch.autocast(
            self.device.type, enabled=False
        ):  # bfloat16 misses by a tenth of a pixel
            return apply_views(images, views)

    def _descend(
        self,
        optimizer: torch.optim.Optimizer,
        weights: Sequence[torch.nn.Parameter],
        terms: LossTerms,
        share: Tensor,
    ) -> None:
        """One step of one network down its weighted terms; the other's weights get no gradient."""
        factors = self.config.losses.model_dump()
        named = {name.split("/")[1]: term for name, term in terms.items() if name[0] in "dg"}
        loss = torch.stack([factors[name] * (term * share).sum() for name, term in named.items()])
        gradients = torch.autograd.grad(loss.sum(), weights, materialize_grads=True)
        for weight, gradient in zip(weights, distributed.sum_gradients(gradients), strict=True):
            # Fused Adam walks through memory: a gradient must lie there as its weight does.
            weight.grad = torch.empty_like(weight).copy_(gradient)
        optimizer.step()

    @torch.no_grad()
    def _average(self) -> None:
        """The EMA generator follows G; its decay ramps up, so that the first steps are forgotten."""
        decay = min(self.config.optimizer.average, (1 + self.steps) / (10 + self.steps))
        followed: list[Tensor] = list(self.g_params)
        torch._foreach_lerp_(list(self.ema_generator.parameters()), followed, 1 - decay)

    def _cast(self) -> torch.autocast:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, besides the config and the data."""
        return {
            "generator": self.generator.state_dict(),
            "discriminator": self.discriminator.state_dict(),
            "ema_generator": self.ema_generator.state_dict(),
            "g_optimizer": self.g_optimizer.state_dict(),
            "d_optimizer": self.d_optimizer.state_dict(),
            "steps": self.steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`, exactly; on what kind of device it was saved is forgotten."""
        for name in ("generator", "discriminator", "ema_generator"):
            getattr(self, name).load_state_dict(state[name])
        for name in ("g_optimizer", "d_optimizer"):
            optimizer: torch.optim.Optimizer = getattr(self, name)
            ours = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({**state[name], "param_groups": ours})
            saved = state[name]["param_groups"]
            for group, was in zip(optimizer.param_groups, saved, strict=True):
                set_lr(group, float(was["lr"]))
        self.update = self._fresh_update()  # what was recorded reads the old optimisers' memory
        self.steps = state["steps"]
