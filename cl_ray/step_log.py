"""What the training loop reports: losses averaged over ranks and steps, and times."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.batch import Losses
from cl_ray.errors import UserError

Metrics = dict[str, float]

T = TypeVar("T")


class NonFiniteLossError(UserError):
    """A loss is NaN or Inf; further steps would not recover."""


@dataclass(frozen=True)
class StepLog:
    """Means and times of the steps since the last log; all but the times are equal on all ranks.

    Args:
        epoch: Index of the current epoch, from 0.
        position: Steps of that epoch that are done.
        step: Steps taken in all.
        metrics: Means over the global batches.
        images: Pairs of all ranks.
        seconds: Wall-clock time.
        data_time: Seconds of these that the loop waited for batches.
    """

    epoch: int
    position: int
    step: int
    metrics: Metrics
    images: int
    seconds: float
    data_time: float


class EpochTimer:
    """Times an epoch and the steps between two logs, and how long the loop waits for batches."""

    def __init__(self) -> None:
        self.start = self.log_start = time.perf_counter()
        self.data_time = self.epoch_data_time = 0.0
        self.epoch_images = 0

    def time_batches(self, batches: Iterator[T]) -> Iterator[T]:
        """Yield the batches, and add up the time until each arrives."""
        start = time.perf_counter()
        for batch in batches:
            self.data_time += time.perf_counter() - start
            yield batch
            start = time.perf_counter()

    def lap(self, images: int) -> tuple[float, float]:
        """Return the seconds and the data time since the last log, in which `images` were seen."""
        lap = time.perf_counter() - self.log_start, self.data_time
        self.epoch_images += images
        self.epoch_data_time += self.data_time
        return lap

    def restart(self) -> None:
        """Start the time of the next log."""
        self.data_time, self.log_start = 0.0, time.perf_counter()

    def epoch_metrics(self) -> Metrics:
        """Return `seconds`, `data_time_fraction` of them, and `images_per_second` of the epoch."""
        seconds = max(time.perf_counter() - self.start, 1e-9)
        return {
            "seconds": seconds,
            "data_time_fraction": self.epoch_data_time / seconds,
            "images_per_second": self.epoch_images / seconds,
        }


def reduce_losses(steps: list[Losses], last_step: int, advice: str) -> tuple[list[str], Tensor]:
    """Sum each rank's part of the losses; the loop waits for the device here.

    Args:
        steps: This rank's part of each loss, for the last steps.
        last_step: Number of the last of these steps.
        advice: Completes the error message.

    Returns:
        The names, and the means over the global batches, float64 [steps, names] on the CPU.

    Raises:
        NonFiniteLossError: A mean is NaN or Inf; on all ranks at once.
    """
    names = list(steps[0])
    table = torch.stack([torch.stack([losses[name] for name in names]) for losses in steps])
    table = distributed.sum_over_ranks(table).cpu().double()  # MPS has no float64
    if not table.isfinite().all():
        row, column = (~table.isfinite()).nonzero()[0].tolist()
        raise NonFiniteLossError(
            f"{names[column]} became {table[row, column].item()} at step "
            f"{last_step - len(steps) + row + 1} {advice}"
        )
    return names, table
