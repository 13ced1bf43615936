"""Who is the negative: the one sampler of pairs, on a device or in a Ray Data task.

Whether a negative is far enough is a matter of pixels; which of those is taken may be one of D's
embedding (harder negatives: Robinson et al., 2021, section 3, by choice in place of weights).
Distances are Euclidean over pixels. They are computed in whole numbers of uint8 pixels, squared,
so that a pair is accepted or not alike on every device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cl_ray.data.config import PairConfig
from cl_ray.errors import UserError

Embed = Callable[[Tensor], Tensor]
"""Unit embeddings [n, e] of uint8 images [n, H, W, C]."""

EMBEDDED = 512
"""Candidates that are embedded at once."""
ROUNDS = 4
"""Times that candidates are drawn again for rows whose farthest is too near; then all are tried."""


class PairSampler:
    """Draws a partner and a negative for positives, all from one pool of images.

    Args:
        config: The mode, the number of candidates and the quantile.
        images: The pool, uint8 [n, ...], on any device.
        labels: Class numbers [n] of the pool, needed by the mode `labels`.
        distance: The data's pairwise distance at the configured quantile, pixels in [0, 1].

    With `negatives` "hard" its `embed` must be set before it draws.

    Raises:
        UserError: The pool can never give a pair: fewer images than candidates, images all
            alike, no labels or one class only.
    """

    def __init__(self, config: PairConfig, images: Tensor, labels: Tensor | None, distance: float):
        self.config, self.pictures, self.images = config, images, images.flatten(1)
        self.embed: Embed | None = None
        self.labels = labels if config.mode == "labels" else None
        self.bound = int(-(-((distance * 255) ** 2) // 1))  # rounded up: never nearer
        if len(images) <= config.candidates:
            raise UserError(
                f"pairs.candidates {config.candidates} needs more images than the {len(images)} "
                "that are paired together: lower it, or give each worker more images."
            )
        if distance <= 0:
            raise UserError(
                f"The distance at pairs.quantile {config.quantile} is 0, the images are (nearly) "
                "all alike: there is no negative to find; take other data or a higher quantile."
            )
        if config.mode == "labels":
            if labels is None:
                raise UserError(
                    "pairs.mode `labels` needs labels, and this data has none: use `views`."
                )
            self.order = torch.argsort(labels, stable=True)
            classes, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
            if len(classes) < 2:
                raise UserError(
                    f"pairs.mode `labels` needs two classes, and all images are of class "
                    f"{int(classes[0])}: use `views`."
                )
            self.first = (counts.cumsum(0) - counts)[inverse]  # where a row's class begins in order
            self.count = counts[inverse]
            self.place = torch.empty_like(self.order)
            self.place[self.order] = torch.arange(len(labels), device=labels.device)

    def draw(self, positives: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Partners and negatives of `positives`, as rows of the pool.

        Args:
            positives: Rows [b] of the pool.
            generator: A CPU generator; what it draws depends on nothing but its state and the pool.

        Returns:
            Partners [b] (in the mode `views`, the positives themselves) and negatives [b].

        Raises:
            UserError: A positive has no image in the pool as far off as the bound.
        """
        partners = self._partners(positives, generator)
        negatives, far = self._choose(positives, generator)
        for _ in range(ROUNDS):
            near = (~far).nonzero().squeeze(1)
            if not len(near):
                return partners, negatives
            negatives[near], far[near] = self._choose(positives[near], generator)
        for row in (~far).nonzero().squeeze(1).tolist():
            negatives[row] = self._any(int(positives[row]), generator)
        return partners, negatives

    def _partners(self, positives: Tensor, generator: torch.Generator) -> Tensor:
        if self.labels is None:
            return positives
        # Another of the class: a step of 1 to count - 1 around the class's own circle of rows.
        # An image that is alone in its class is its own partner.
        count, first = self.count[positives], self.first[positives]
        step = (self._uniform(len(positives), generator) * (count - 1)).long() + 1
        place = first + (self.place[positives] - first + step) % count
        return self.order[place]

    def _choose(self, positives: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """One of the candidates of each positive, and whether it is far enough."""
        shape = len(positives), self.config.candidates
        others = len(self.images) - 1
        drawn = torch.randint(others, shape, generator=generator).to(self.images.device)
        candidates = drawn + (drawn >= positives[:, None])  # never the positive itself
        distance = self._squared_distance(positives, candidates)
        if self.labels is not None:
            same = self.labels[candidates] == self.labels[positives][:, None]
            distance = distance.masked_fill(same, -1)
        wanted = distance
        if self.config.negatives == "hard":
            likeness = self._likeness(positives, candidates)
            wanted = likeness.masked_fill(distance < self.bound, -torch.inf)
        which = wanted.argmax(1, keepdim=True)
        far = distance.gather(1, which).squeeze(1) >= self.bound
        return candidates.gather(1, which).squeeze(1), far

    def _likeness(self, positives: Tensor, candidates: Tensor) -> Tensor:
        """Cosines of D's embeddings of rows [b] to those of rows [b, k]."""
        assert self.embed is not None, "hard negatives are by an embedding"
        anchors = self.embed(self.pictures[positives])
        rows = candidates.flatten().split(EMBEDDED)
        others = torch.cat([self.embed(self.pictures[part]) for part in rows])
        others = others.view(*candidates.shape, -1)
        return (anchors[:, None] * others).sum(2)

    def _any(self, positive: int, generator: torch.Generator) -> int:
        """One of all the images that are far enough, by an exhaustive look."""
        row = torch.tensor([positive], device=self.images.device)
        everyone = torch.arange(len(self.images), device=self.images.device)
        distance = torch.cat(
            [self._squared_distance(row, some[None])[0] for some in everyone.split(4096)]
        )
        if self.labels is not None:
            distance[self.labels == self.labels[positive]] = -1
        allowed = (distance >= self.bound).nonzero().squeeze(1)
        if not len(allowed):
            raise UserError(
                f"Image {positive} of a shard of {len(self.images)} has no negative as far as "
                f"{self.bound**0.5 / 255:.2f} (pairs.quantile {self.config.quantile}); the "
                f"farthest is at {max(float(distance.max()), 0) ** 0.5 / 255:.2f}: lower it."
            )
        return int(allowed[int(torch.randint(len(allowed), (), generator=generator))])

    def _squared_distance(self, positives: Tensor, candidates: Tensor) -> Tensor:
        """Squared distances of rows [b] to rows [b, k] (or [1, k]), in units of 1/255, exact."""
        difference = self.images[candidates].int() - self.images[positives].int()[:, None]
        return difference.square_().sum(2)

    def _uniform(self, count: int, generator: torch.Generator) -> Tensor:
        drawn = torch.rand(count, generator=generator, dtype=torch.float64)
        # MPS has no float64; float32 is enough below 16 million images of a class.
        kind = torch.float32 if self.images.device.type == "mps" else torch.float64
        return drawn.to(self.images.device, kind)
