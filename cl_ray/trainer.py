"""A run: the loop over epochs, free of Ray. Ray Train's workers, Tune and notebooks host it."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.data.loaders import InMemoryLoader, PairLoader
from cl_ray.data.partition import NOT_STREAMED, TRAIN_SPLIT
from cl_ray.data.sampling import sample_rows
from cl_ray.errors import UserError
from cl_ray.gan import ContrastiveGAN, PairBatch
from cl_ray.networks.normalize import to_unit
from cl_ray.prior import IMAGES, Prior, fit_class_priors, fit_prior
from cl_ray.train_config import TrainerConfig

Metrics = dict[str, float]

ENCODED = 500
"""Images that are encoded at once."""


class NonFiniteLossError(UserError):
    """A loss is no longer a number; training on would only spread it."""


@dataclass(frozen=True)
class StepLog:
    """What the last few steps were like; alike on every rank but for the times.

    Args:
        epoch: The epoch that is under way, from 0.
        position: Steps of it that are done.
        step: Steps taken in all.
        metrics: Means over the global batches since the last record.
        images: Pairs seen since then, over all ranks.
        seconds: Since then.
        waited: Of those, seconds that went by until a batch was there.
    """

    epoch: int
    position: int
    step: int
    metrics: Metrics
    images: int
    seconds: float
    waited: float


class Trainer:
    """a ContrastiveGAN, its data, and where it stands.

    Args:
        config: The config tree.
        shard: This rank's batches.
        device: Where to compute.
        dtype: See `Adversary`.

    Raises:
        UserError: Hard negatives are wanted of a shard that streams.
    """

    def __init__(
        self,
        config: TrainerConfig,
        shard: PairLoader,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.shard = config, shard
        share = shard.partition
        self.gan = ContrastiveGAN(config, share.dataset.info.shape, device, dtype, share.classes)
        if config.pairs.negatives == "hard":
            if not isinstance(shard, InMemoryLoader):
                raise UserError(NOT_STREAMED)
            shard.sampler.embed = self.gan.embed
        self.epochs = 0
        """Epochs finished."""
        self.position = 0
        """Steps done in the epoch under way."""
        self.sums: Metrics = {}
        """Sums of metrics over those steps, for the epoch's means."""
        self.prior: Prior | None = None
        """Where the codes of images lay at the end of the last epoch; alike on every rank."""
        self.drawn: tuple[Tensor, Tensor | None] | None = None
        """The images that it is fitted to, and their classes where G is told them."""
        self.batch: PairBatch | None = None
        """The epoch's last batch but one, to be looked at: the last may be nearly empty."""

    def train_epoch(self, watch: Callable[[StepLog], None] | None = None) -> Metrics:
        """Train to the end of the epoch under way.

        Args:
            watch: Called with a record every `log_every` steps, before a checkpoint is due and
                at the end; may save `state_dict()`.

        Returns:
            The mean of each figure over the epoch's steps, and what it cost: `seconds`,
            `waited` (share of them spent waiting for data) and `images_per_second`.

        Raises:
            Diverged: A loss is not finite; names the step and the loss.
        """
        every = self.config.checkpoint.every
        rows = self.shard.partition.dataset.info.splits[TRAIN_SPLIT].rows
        pending: list[dict[str, Tensor]] = []
        begun = since = time.perf_counter()
        waited = total_waited = 0.0
        images = 0
        batches = self.shard.batches(self.epochs, self.position)
        while self.position < self.shard.partition.steps:
            asked = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - asked
            self.gan.set_lr_scale(self.rate())
            pending.append(self.gan.step(batch))
            self.position += 1
            last = self.position == self.shard.partition.steps
            self.batch = self.batch if self.batch and last else batch
            due = every and self.gan.steps % every == 0
            if self.position % self.config.log_every == 0 or last or due:
                metrics = self._drain(pending)
                now = time.perf_counter()
                first = (self.position - len(pending)) * self.config.batch_size
                seen = min(len(pending) * self.config.batch_size, rows - first)
                images, total_waited = images + seen, total_waited + waited
                if watch:
                    step = self.gan.steps
                    seconds = now - since
                    watch(StepLog(self.epochs, self.position, step, metrics, seen, seconds, waited))
                pending, waited, since = [], 0.0, time.perf_counter()
        means = {name: total / self.position for name, total in self.sums.items()}
        seconds = max(time.perf_counter() - begun, 1e-9)
        self.epochs, self.position, self.sums = self.epochs + 1, 0, {}
        self.fit_prior()
        cost = {"seconds": seconds, "waited": total_waited / seconds}
        return {**means, **cost, "images_per_second": images / seconds}

    def fit_prior(self) -> None:
        """Fit the density that samples are drawn from to the codes of some training images."""
        components = self.config.generator.prior
        if not components:
            return
        if self.drawn is None:
            rows = sample_rows(self.shard.partition.dataset, TRAIN_SPLIT, IMAGES, self.config.seed)
            labels = None
            if self.gan.classes and rows.label is not None:
                labels = torch.from_numpy(rows.label).to(self.gan.device)
            self.drawn = torch.from_numpy(rows.image).to(self.gan.device), labels
        images, labels = self.drawn
        ema_generator, dtype = self.gan.ema_generator, self.gan.dtype
        with torch.no_grad():
            parts = [ema_generator.encode(to_unit(x, dtype)) for x in images.split(ENCODED)]
        codes = torch.cat(parts)
        seed, latent_noise_std = self.config.seed, self.config.generator.latent_noise_std
        if not codes.isfinite().all():
            self.prior = None
        elif labels is None:
            self.prior = fit_prior(codes, components, seed, latent_noise_std)
        else:
            count = len(self.gan.classes)
            self.prior = fit_class_priors(codes, labels, count, components, seed, latent_noise_std)

    def rate(self) -> float:
        """Share of the learning rates at which the next step is taken: 1, then in a line to 0.

        It follows from the position alone, so that a run that goes on has nothing to carry over;
        one that is given more epochs goes back to the rates that a run of that length has there.
        """
        steps = self.shard.partition.steps
        whole = self.config.epochs * steps
        falling = self.config.optimizer.decay * whole
        left = whole - self.epochs * steps - self.position
        return min(1.0, max(0.0, left / falling)) if falling else 1.0

    def _drain(self, pending: list[dict[str, Tensor]]) -> Metrics:
        """Means of pending steps over all ranks; the one moment when the device is waited for."""
        names = list(pending[0])
        table = torch.stack([torch.stack([step[name] for name in names]) for step in pending])
        table = distributed.sum_over_ranks(table).cpu().double()  # MPS has no float64
        if not table.isfinite().all():
            row, column = (~table.isfinite()).nonzero()[0].tolist()
            step = self.gan.steps - len(pending) + row + 1
            rates = self.config.optimizer
            raise NonFiniteLossError(
                f"{names[column]} became {table[row, column].item()} at step {step} (epoch "
                f"{self.epochs + 1}): lower the learning rates, lr_g {rates.lr_g:g} "
                f"and lr_d {rates.lr_d:g}, or the weight of that loss."
            )
        for name, total in zip(names, table.sum(0).tolist(), strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + total
        return dict(zip(names, table.mean(0).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        """All that the rest of the run depends on besides the data, and the config.

        In the first epoch the density that samples are drawn from is fitted for it.
        """
        if not self.epochs:
            self.fit_prior()
        return {
            "gan": self.gan.state_dict(),
            "prior": None if self.prior is None else self.prior._asdict(),
            "epochs": self.epochs,
            "position": self.position,
            "sums": dict(self.sums),
            "workers": self.shard.partition.workers,
            "config": self.config.to_yaml(),
            "shape": list(self.shard.partition.dataset.info.shape),
            "classes": self.shard.partition.classes,
            "counts": self.shard.partition.counts,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`: exactly with as many workers, else from the epoch's start."""
        self.gan.load_state_dict(state["gan"])
        prior = state.get("prior")  # which older checkpoints do not have
        self.prior = None if prior is None else Prior(**prior)
        self.epochs = state["epochs"]
        alike = state["workers"] == self.shard.partition.workers
        self.position = state["position"] if alike else 0
        self.sums = dict(state["sums"]) if alike else {}
