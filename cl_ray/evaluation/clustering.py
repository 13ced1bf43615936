"""Clusters of features: a linear head that learns, without labels, what neighbours share."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from cl_ray.adam import Adam
from cl_ray.evaluation.classifier import Floats, Labels
from cl_ray.evaluation.probes import nearest_neighbours

_NEIGHBOURS, _ENTROPY_WEIGHT = 10, 2.0
_HEADS = 10
"""Heads that are trained at once, from random weights. Most end in a poor optimum, which the loss
tells: without labels, the head of the smallest loss is taken."""
_STEPS, _BATCH, _LR = 250, 1000, 0.1


@dataclass(frozen=True)
class ClusterHead:
    """A linear head whose largest output is the cluster of an image.

    Args:
        mean: Of the features, float32 [d].
        scale: Their common standard deviation.
        weight: float32 [d, K].
        bias: float32 [K].
        loss: Of the images that the head was fitted to, see `fit_cluster_heads`.
    """

    mean: Tensor
    scale: float
    weight: Tensor
    bias: Tensor
    loss: float

    def predict(self, features: Floats) -> Labels:
        """Return the clusters, int64 [M] from 0 to K - 1, of features [M, d]."""
        x = (torch.from_numpy(features) - self.mean) / self.scale
        return (x @ self.weight + self.bias).argmax(1).numpy()


def fit_cluster_heads(features: Floats, clusters: int, seeds: Sequence[int]) -> list[ClusterHead]:
    """Fit heads that give neighbours the same cluster, and all clusters as many images.

    SCAN (Van Gansbeke et al., 2020), equation 2, on frozen features: with p the softmax of the
    head's outputs, the mean of -log(p_i . p_j) over neighbours i, j, less `_ENTROPY_WEIGHT` times
    the entropy of the mean p. k-means looks for compact groups instead, and often splits a class
    and merges two others.

    Args:
        features: float32 [N, d], N of two or more; few dimensions, such as `principal_components`.
        clusters: How many to find, K.
        seeds: Of the first weights and the batches; a head for each.
    """
    x = torch.from_numpy(features)
    mean = x.mean(0)
    scale = max(float((x - mean).std()), 1e-12)
    x = (x - mean) / scale
    k = min(_NEIGHBOURS, len(x) - 1)
    # The first of an image's neighbours is itself, or as near.
    neighbours = torch.from_numpy(nearest_neighbours(x.numpy(), x.numpy(), k + 1)[:, 1:])
    return [ClusterHead(mean, scale, *_fit(x, neighbours, clusters, seed)) for seed in seeds]


@torch.enable_grad()
def _fit(x: Tensor, neighbours: Tensor, clusters: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Return the weight, the bias and the loss of the best of `_HEADS` heads."""
    random = torch.Generator().manual_seed(seed)
    shape = (x.shape[1], _HEADS * clusters)
    weight = (torch.randn(shape, generator=random) / shape[0] ** 0.5).requires_grad_()
    bias = torch.zeros(shape[1], requires_grad=True)

    def assign(rows: Tensor) -> Tensor:
        return (rows @ weight + bias).view(len(rows), _HEADS, clusters).softmax(2)

    optimizer = Adam([weight, bias], lr=_LR)
    for step in range(_STEPS):
        optimizer.param_groups[0]["lr"] = _LR * min(1.0, 2 * (1 - step / _STEPS))
        rows = torch.randint(len(x), (min(_BATCH, len(x)),), generator=random)
        chosen = torch.randint(neighbours.shape[1], rows.shape, generator=random)
        first, second = assign(x[rows]), assign(x[neighbours[rows, chosen]])
        loss = disagreement(first, second) - _ENTROPY_WEIGHT * balance(first, second)
        optimizer.zero_grad()
        loss.sum().backward()
        optimizer.step()
    with torch.no_grad():
        p = assign(x)
        losses = torch.stack([disagreement(p, p[column]) for column in neighbours.T]).mean(0)
        losses -= _ENTROPY_WEIGHT * balance(p)
        best = int(losses.argmin())
        weights = weight.view(-1, _HEADS, clusters)[:, best].clone()
        return weights, bias.view(_HEADS, -1)[best].clone(), float(losses[best])


def disagreement(first: Tensor, second: Tensor) -> Tensor:
    """Compute the mean of -log(p . q) over pairs of rows [n, heads, K], for each head."""
    return -(first * second).sum(2).clamp(min=1e-8).log().mean(0)


def balance(*parts: Tensor) -> Tensor:
    """Compute the entropy of the mean probabilities of rows [n, heads, K], for each head."""
    mean = torch.cat(parts).mean(0)
    return -(mean * mean.clamp(min=1e-8).log()).sum(1)  # an empty cluster's gradient is finite
