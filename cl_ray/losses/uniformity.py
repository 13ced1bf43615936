"""Uniformity of the encoder's latent vectors on the sphere that noise is drawn from."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl_ray.losses.contrastive import allowed_keys, select_queries

SHARPNESS = 2.0
"""Wang and Isola's t; the value of all their experiments."""


def uniformity(latents: Tensor, present: Tensor) -> Tensor:
    """Compute the log of the mean Gaussian potential between directions of latent vectors.

    Wang and Isola (2020), equation 5, for each vector against all others of the global batch, so
    that it is a mean over pairs like every other loss. It is least for a uniform distribution.

    Args:
        latents: [k, n, d], k vectors of each of the n pairs of the global batch.
        present: Bool, n in any shape, false for padding; padding is not another vector.

    Returns:
        [m], for this rank's `loss_rows`: in [-4 t, 0], the mean over each pair's k vectors; 0
        without another vector.
    """
    parts = len(latents)
    directions = normalize(latents, dim=2)
    queries, positions = select_queries(directions, parts)
    with torch.autocast(latents.device.type, enabled=False):  # as in `view_losses`
        cosine = queries @ directions.flatten(0, 1).T
    potential = SHARPNESS * (2 * cosine - 2)  # |u - v|^2 = 2 - 2 u v
    allowed = allowed_keys(present, parts, positions)
    number = allowed.sum(1)
    potential = potential.masked_fill(~allowed, float("-inf"))
    potential = potential.masked_fill((number == 0)[:, None], 0)  # finite; masked at the end
    log_mean = potential.logsumexp(1) - number.clamp(min=1).to(potential.dtype).log()
    return log_mean.masked_fill(number == 0, 0).view(parts, -1).mean(0)
