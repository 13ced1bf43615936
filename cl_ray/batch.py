"""Named parts of what a training step takes and computes.

Throughout, b is the number of pairs in this rank's batch. A step works on two real images of each
pair, x+ and x-, and on three fakes of it, G(x+), G(x-) and G(z).
"""

from collections.abc import Mapping
from typing import Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")

Losses = dict[str, Tensor]
"""By name: the loss of each pair of this rank's batch, [b], or of the batches of all N ranks,
[N b], equal on every rank; or the rank's part of the mean over the global batch."""


class PairBatch(NamedTuple):
    """One rank's b pairs, uint8 [b, H, W, C] each.

    Args:
        positive: x+.
        partner: Source of the second view: x+ again, or another image of its class.
        negative: x-.
        present: Bool [N, b], of the batches of all N ranks; false rows pad the last batch and have
            no weight.
        labels: Classes of x+ and x-, int64 [b, 2]; None unless `condition` uses labels.
        labelled: Bool [b, 2], false where an image has no label; None if all have one.
    """

    positive: Tensor
    partner: Tensor
    negative: Tensor
    present: Tensor
    labels: Tensor | None = None
    labelled: Tensor | None = None

    @property
    def real(self) -> "RealParts[Tensor]":
        """x+ and x-."""
        return RealParts(self.positive, self.negative)

    @property
    def part_labels(self) -> Tensor | None:
        """Classes of x+, x-, G(x+), G(x-), G(z) and the two views of x+, [7, b].

        G(z) is generated as one of x+'s class.
        """
        if self.labels is None:
            return None
        positive, negative = self.labels.unbind(1)
        return torch.stack([positive, negative, positive, negative, *[positive] * 3])

    @property
    def real_labels(self) -> Tensor | None:
        """Classes of x+ and x-, [2, b]."""
        return None if self.part_labels is None else self.part_labels[:2]

    @property
    def fake_labels(self) -> Tensor | None:
        """Classes of G(x+), G(x-) and G(z), [3, b]."""
        return None if self.part_labels is None else self.part_labels[2:5]


class RealParts(NamedTuple, Generic[T]):
    """One value for each real image of a pair: x+ and x-."""

    positive: T
    negative: T


class FakeParts(NamedTuple, Generic[T]):
    """One value for each fake of a pair: G(x+), G(x-) and G(z)."""

    positive: T
    negative: T
    noise: T


class GeneratorOutput(NamedTuple):
    """G of a batch.

    Args:
        fake: G(x+), G(x-) and G(z), [b, C, H, W] each in [-1, 1].
        latents: Latent vectors of x+ and x-, before noise, [2, b, latent].
    """

    fake: FakeParts[Tensor]
    latents: Tensor


class DiscriminatorOutput(NamedTuple):
    """D of n images, in the precision of its weights.

    Args:
        score: [n]; high is real.
        embedding: Unit vectors [n, e].
        class_logits: [n, classes]; None unless D is an auxiliary classifier.
        fake_embedding: Unit vectors [n, e] of ContraD's second projection; None without one.
    """

    score: Tensor
    embedding: Tensor
    class_logits: Tensor | None = None
    fake_embedding: Tensor | None = None

    def split(self, parts: int) -> list["DiscriminatorOutput"]:
        """Split the output for `parts` concatenated batches into one output for each."""
        split = [
            [None] * parts if value is None else value.unflatten(0, (parts, -1)).unbind()
            for value in self
        ]
        return [DiscriminatorOutput(*values) for values in zip(*split, strict=True)]


class DiscriminatorInput(NamedTuple):
    """All images that D sees in its step, [b, C, H, W] each, augmented.

    Args:
        real: x+ and x-.
        fake: G(x+), G(x-) and G(z), detached from G.
        views: Two views of x+; empty if no loss uses them.
    """

    real: RealParts[Tensor]
    fake: FakeParts[Tensor]
    views: tuple[Tensor, ...] = ()


class DiscriminatorPass(NamedTuple):
    """D's output for each part of a `DiscriminatorInput`, and what losses compare pair with pair.

    Args:
        real: Of x+ and x-.
        fake: Of the fakes.
        views: Of the two views of x+.
        gathered: Vectors of the global batch, [k, N b, d], by name: `view_embeddings`, G's
            `latents`, and of x+ and x- whether they are `labelled`, 1 or 0, if not all are.
    """

    real: RealParts[DiscriminatorOutput]
    fake: FakeParts[DiscriminatorOutput]
    views: tuple[DiscriminatorOutput, ...] = ()
    gathered: Mapping[str, Tensor] = {}

    def mean_scores(self) -> Losses:
        """Return the mean scores of the real images and of the fakes of each pair, detached."""
        real, fake = stack_scores(self.real).detach(), stack_scores(self.fake).detach()
        return {"score/real": real.mean(0), "score/fake": fake.mean(0)}


def stack_scores(parts: RealParts[DiscriminatorOutput] | FakeParts[DiscriminatorOutput]) -> Tensor:
    """Stack the scores of k parts, [k, b]."""
    return torch.stack([part.score for part in parts])
