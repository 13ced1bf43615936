"""Sampling of pairs: a partner and a negative for each positive image.

A negative must be far from its positive in pixels. Of the candidates that are, either the farthest
is taken, or the one whose embedding by D is most similar (a hard negative, after Robinson et al.,
2021, section 3, by selection instead of weights).

Distances are Euclidean over pixels (of images above 64 pixels, over every second, third or fourth
row and column), computed as squared integers of uint8 pixels, so that a pair is accepted or
rejected identically on every device.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from cl_ray.data.config import PairConfig
from cl_ray.data.dataset import UNLABELLED, distance_stride
from cl_ray.errors import UserError

Embed = Callable[[Tensor], Tensor]
"""Maps uint8 images [n, H, W, C] to unit embeddings [n, e]."""

_EMBED_CHUNK = 512
"""Candidates that are embedded at once."""
_CACHED_VALUES, _GPU_VALUES = 2**18, 2**26
"""Differences of pixels that a CPU, in its cache, and a GPU compute at once."""
_DISTANCE_CHUNK = 4096
"""Images that an exhaustive search compares at once."""
_RESAMPLE_ROUNDS = 4
"""Times that candidates are redrawn for rows without a far one, before the exhaustive search."""


class PairSampler:
    """Samples a partner and a negative for positives, all from one pool of images.

    Args:
        config: The mode, the number of candidates and the quantile.
        images: The pool, uint8 [n, H, W, C], on any device.
        labels: Class indices [n] of the pool, required by the mode `labels`. An image without a
            label, UNLABELLED, pairs as in the mode `views`, and is a negative of a labelled one
            only if no labelled one is far enough. If fewer than two classes of the pool have
            labels, all pair as in `views`.
        distance: The smallest distance of a negative, pixels scaled to [0, 1].

    With `negatives` "hard", `embed` must be set before sampling.

    Raises:
        UserError: The pool can never give a pair: no more images than candidates, all images
            alike, no labels or one class only.
    """

    def __init__(self, config: PairConfig, images: Tensor, labels: Tensor | None, distance: float):
        self.config, self.images = config, images
        stride = distance_stride(images.shape[1])
        self.pixels = images[:, ::stride, ::stride].flatten(1)
        # Pixels that a float32 adds up exactly; their number divides that of all.
        self.block = max(n for n in range(1, 257) if self.pixels.shape[1] % n == 0)
        self.embed: Embed | None = None
        self.labels: Tensor | None = None
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
            known = labels[labels != UNLABELLED].unique()
            if len(known) == 1 and (labels != UNLABELLED).all():
                raise UserError(
                    f"pairs.mode `labels` needs two classes, and all images are of class "
                    f"{int(known[0])}: use `views`."
                )
            self.labels = labels if len(known) > 1 else None
            # Of each row, its position among the labelled ones.
            self.labelled = (labels != UNLABELLED).nonzero().squeeze(1)
            self.rank = (labels != UNLABELLED).cumsum(0) - 1
            # Each unlabelled image is alone in a class of its own, with a negative number.
            own_class = -1 - torch.arange(len(labels), device=labels.device)
            labels = torch.where(labels == UNLABELLED, own_class, labels)
            # Rows ordered by class; of each row, its class's first position there and size.
            self.order = torch.argsort(labels, stable=True)
            _, inverse, counts = labels.unique(return_inverse=True, return_counts=True)
            self.first = (counts.cumsum(0) - counts)[inverse]
            self.count = counts[inverse]
            self.position = torch.empty_like(self.order)
            self.position[self.order] = torch.arange(len(labels), device=labels.device)

    def sample(self, positives: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Sample partners and negatives of `positives`.

        Args:
            positives: Row indices [b] of the pool.
            generator: A CPU generator; the result depends on its state and the pool only.

        Returns:
            Row indices [b] of partners (in the mode `views`, the positives) and of negatives.

        Raises:
            UserError: A positive has no image in the pool that is far enough.
        """
        partners = self._sample_partners(positives, generator)
        negatives, far = self._sample_negatives(positives, generator)
        for _ in range(_RESAMPLE_ROUNDS):
            near = (~far).nonzero().squeeze(1)
            if not len(near):
                return partners, negatives
            negatives[near], far[near] = self._sample_negatives(positives[near], generator)
        for row in (~far).nonzero().squeeze(1).tolist():
            negatives[row] = self._exhaustive_negative(int(positives[row]), generator)
        return partners, negatives

    def _sample_partners(self, positives: Tensor, generator: torch.Generator) -> Tensor:
        if self.labels is None:
            return positives
        # Another image of the class: 1 to count - 1 positions further, modulo count. An image that
        # is alone in its class is its own partner.
        count, first = self.count[positives], self.first[positives]
        uniform = torch.rand(len(positives), generator=generator, dtype=torch.float64)
        # MPS has no float64; float32 is enough below 16 million images of a class.
        dtype = torch.float32 if self.pixels.device.type == "mps" else torch.float64
        step = (uniform.to(self.pixels.device, dtype) * (count - 1)).long() + 1
        return self.order[first + (self.position[positives] - first + step) % count]

    def _sample_negatives(
        self, positives: Tensor, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Choose one of the candidates of each positive; also tell whether it is far enough."""
        shape = len(positives), self.config.candidates
        others = len(self.pixels) - 1
        drawn = torch.randint(others, shape, generator=generator).to(self.pixels.device)
        candidates = drawn + (drawn >= positives[:, None])  # never the positive itself
        if self.labels is not None:  # of a labelled image, labelled ones
            drawn = drawn * (len(self.labelled) - 1) // others
            drawn += drawn >= self.rank[positives][:, None]
            is_labelled = self.labels[positives][:, None] != UNLABELLED
            candidates = torch.where(is_labelled, self.labelled[drawn], candidates)
        distance = self._squared_distance(positives, candidates)
        if self.labels is not None:
            excluded = self._may_be_same_class(positives[:, None], candidates)
            distance = distance.masked_fill(excluded, -1)
        score = distance
        if self.config.negatives == "hard":
            similarity = self._similarity(positives, candidates)
            score = similarity.masked_fill(distance < self.bound, -torch.inf)
        best = score.argmax(1, keepdim=True)
        far = distance.gather(1, best).squeeze(1) >= self.bound
        return candidates.gather(1, best).squeeze(1), far

    def _may_be_same_class(self, positives: Tensor, candidates: Tensor) -> Tensor:
        """Return whether candidates are of the positives' class, or may be, having no label."""
        assert self.labels is not None
        of_positive, of_candidate = self.labels[positives], self.labels[candidates]
        may_be = (of_candidate == of_positive) | (of_candidate == UNLABELLED)
        return may_be & (of_positive != UNLABELLED)

    def _similarity(self, positives: Tensor, candidates: Tensor) -> Tensor:
        """Return the cosine similarity of embeddings of rows [b] to those of rows [b, k]."""
        assert self.embed is not None, "hard negatives need an embedding"
        anchors = self.embed(self.images[positives])
        rows = candidates.flatten().split(_EMBED_CHUNK)
        others = torch.cat([self.embed(self.images[part]) for part in rows])
        others = others.view(*candidates.shape, -1)
        return (anchors[:, None] * others).sum(2)

    def _exhaustive_negative(self, positive: int, generator: torch.Generator) -> int:
        """Sample one of all images of the pool that are far enough."""
        row = torch.tensor([positive], device=self.pixels.device)
        rows = torch.arange(len(self.pixels), device=self.pixels.device).split(_DISTANCE_CHUNK)
        distance = torch.cat([self._squared_distance(row, part[None])[0] for part in rows])
        far = distance >= self.bound
        if self.labels is not None:
            excluded = self._may_be_same_class(row, torch.cat(rows))
            distance[excluded] = -1
            if not (far & ~excluded).any():  # of few labelled images
                excluded = self.labels != UNLABELLED
            far &= ~excluded
        allowed = far.nonzero().squeeze(1)
        if not len(allowed):
            raise UserError(
                f"Image {positive} of {len(self.pixels)} paired together has no negative as far as "
                f"{self.bound**0.5 / 255:.2f} (pairs.quantile {self.config.quantile}); the "
                f"farthest is at {max(float(distance.max()), 0) ** 0.5 / 255:.2f}: lower it."
            )
        return int(allowed[int(torch.randint(len(allowed), (), generator=generator))])

    def _squared_distance(self, positives: Tensor, candidates: Tensor) -> Tensor:
        """Return exact squared distances of rows [b] to rows [b, k] or [1, k], in 1/255 units."""
        values = _CACHED_VALUES if self.pixels.device.type == "cpu" else _GPU_VALUES
        size = max(1, values // (candidates.shape[1] * self.pixels.shape[1]))
        squares = (
            (self.pixels[others].float() - self.pixels[rows].float()[:, None]).square_()
            for rows, others in zip(positives.split(size), candidates.split(size), strict=True)
        )
        # float32 is twice as fast as int32 and exact: its sums are below 256 · 255² < 2**24, and
        # those of int32 at most 64 · 64 · 3 · 255².
        parts = [part.unflatten(2, (-1, self.block)).sum(3) for part in squares]
        return torch.cat([part.sum(2, dtype=torch.int32) for part in parts]).long()
