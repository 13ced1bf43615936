"""The training loop over epochs. Ray Train's workers, Tune's trials and notebooks host it."""

from collections.abc import Callable
from typing import Any

import torch

from cl_ray.batch import Losses, PairBatch
from cl_ray.data.loaders import InMemoryLoader, PairLoader
from cl_ray.data.partition import HARD_NEGATIVES_NEED_MEMORY
from cl_ray.errors import UserError
from cl_ray.gan import ContrastiveGAN
from cl_ray.prior import Prior, PriorFitter
from cl_ray.step_log import EpochTimer, Metrics, NonFiniteLossError, StepLog, reduce_losses
from cl_ray.train_config import TrainerConfig


class Trainer:
    """A ContrastiveGAN, its data, and its progress.

    Args:
        config: The method, the data and the length of training.
        loader: This rank's batches.
        device: Device of the networks.
        dtype: See `ContrastiveGAN`.

    Raises:
        UserError: Hard negatives are configured with a loader that streams.
    """

    def __init__(
        self,
        config: TrainerConfig,
        loader: PairLoader,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ):
        self.config, self.loader, self.partition = config, loader, loader.partition
        dataset, classes = self.partition.dataset, self.partition.classes
        self.gan = ContrastiveGAN(config, dataset.info.shape, device, dtype, classes)
        if config.pairs.negatives == "hard":
            if not isinstance(loader, InMemoryLoader):
                raise UserError(HARD_NEGATIVES_NEED_MEMORY)
            loader.sampler.embed = self.gan.embed
        self.prior_fitter = PriorFitter(self.partition, config)
        self.prior: Prior | None = None
        """Fitted after each epoch, by rank 0, which saves it and samples from it."""
        self.prior_step = 0
        """The step that it was fitted at."""
        self.epochs = 0
        """Epochs finished."""
        self.position = 0
        """Steps done in the current epoch."""
        self.sums: Metrics = {}
        """Sums of the metrics over these steps."""
        self.preview_batch: PairBatch | None = None
        """The epoch's last batch but one, for sample grids: the last one may be nearly empty."""

    def train_epoch(self, on_log: Callable[[StepLog], None] | None = None) -> Metrics:
        """Train to the end of the current epoch.

        Args:
            on_log: Called every `log_every` steps, when a checkpoint is due and at the end of the
                epoch; may save `state_dict()`.

        Returns:
            Mean of each metric over the epoch's steps, `seconds`, `data_time_fraction` (of the
            seconds) and `images_per_second`.

        Raises:
            NonFiniteLossError: A loss is NaN or Inf, or weights that are about to be saved; names
                the step and the loss.
        """
        timer, every = EpochTimer(), self.config.checkpoint.every
        steps: list[Losses] = []
        for batch in timer.time_batches(self.loader.batches(self.epochs, self.position)):
            self.gan.set_lr_scale(self.lr_scale())
            steps.append(self.gan.train_step(batch))
            self.position += 1
            is_last = self.position == self.partition.steps
            is_checkpoint_due = every and self.gan.steps % every == 0
            if not is_last or self.preview_batch is None:
                self.preview_batch = batch
            if is_last or is_checkpoint_due or self.position % self.config.log_every == 0:
                log = self._log(steps, timer)
                if is_last or is_checkpoint_due:
                    self._check_weights()
                if on_log:
                    on_log(log)
                steps = []
                timer.restart()
        metrics = {name: total / self.position for name, total in self.sums.items()}
        metrics |= timer.epoch_metrics()
        self.epochs, self.position, self.sums = self.epochs + 1, 0, {}
        self.fit_prior()
        return metrics

    def fit_prior(self) -> None:
        """Fit the prior that samples are drawn from to the EMA generator, on rank 0."""
        self.prior_step = self.gan.steps
        if self.partition.rank == 0:
            self.prior = self.prior_fitter.fit(self.gan.ema_generator, self.gan.discriminator)

    def lr_scale(self) -> float:
        """Return the next step's fraction of the learning rates: up to 1, then down to 0, linearly.

        It is a function of the position only, so a resumed run needs no scheduler state, and a run
        that is given more epochs continues at the rates of a run of that length.
        """
        done = self.epochs * self.partition.steps + self.position
        return self.config.lr_scale(done, self.config.epochs * self.partition.steps)

    def _log(self, steps: list[Losses], timer: EpochTimer) -> StepLog:
        """Average the losses of the last steps, and add them to the epoch's sums."""
        names, table = reduce_losses(steps, self.gan.steps, self._advice("the weight of that loss"))
        for name, total in zip(names, table.sum(0).tolist(), strict=True):
            self.sums[name] = self.sums.get(name, 0.0) + total
        done = range(self.position - len(steps), self.position)
        images = sum(int(self.partition.present(step).sum()) for step in done)
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        step, times = self.gan.steps, timer.lap(images)
        return StepLog(self.epochs, self.position, step, means, images, *times)

    def _check_weights(self) -> None:
        """Check what a checkpoint would hold; all ranks have the same weights."""
        networks = self.gan.generator, self.gan.discriminator, self.gan.ema_generator
        weights = [weight for network in networks for weight in network.parameters()]
        if not torch.stack([weight.isfinite().all() for weight in weights]).all():
            advice = self._advice("the weights of the losses")
            raise NonFiniteLossError(f"Weights became NaN or Inf by step {self.gan.steps} {advice}")

    def _advice(self, loss_weights: str) -> str:
        """Complete the message of a `NonFiniteLossError`."""
        options = self.config.optimizer
        return (
            f"(epoch {self.epochs + 1}): lower the learning rates, lr_g {options.lr_g:g} and lr_d "
            f"{options.lr_d:g}, or {loss_weights}."
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that the rest of the run depends on besides the data, and the config.

        The prior is fitted for it if G has taken a tenth of its steps since the last fit.
        """
        since = self.gan.steps - self.prior_step
        if since and since >= self.gan.steps // 10:
            self.fit_prior()
        return {
            "gan": self.gan.state_dict(),
            "prior": None if self.prior is None else self.prior._asdict(),
            "prior_step": self.prior_step,
            "epochs": self.epochs,
            "position": self.position,
            "sums": dict(self.sums),
            "workers": self.partition.workers,
            "config": self.config.to_yaml(),
            "data": self.partition.dataset.info.fingerprint,
            "shape": list(self.partition.dataset.info.shape),
            "classes": self.partition.classes,
            "counts": self.partition.counts,
            "predicted_labels": self.partition.dataset.info.predicted_labels,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume from `state_dict`: exactly with as many workers, else from the epoch's start.

        Raises:
            UserError: The state is of a run on other images or classes.
        """
        self.partition.dataset.check_same(state.get("data"))
        self.gan.load_state_dict(state["gan"])
        prior = state.get("prior")  # a checkpoint without one has no entry
        self.prior = None if prior is None else Prior(**prior)
        self.prior_step = state.get("prior_step", 0)
        same_workers = state["workers"] == self.partition.workers
        self.epochs = state["epochs"]
        self.position = state["position"] if same_workers else 0
        self.sums = dict(state["sums"]) if same_workers else {}
