"""Uniformity of the encoder's latent vectors on the sphere that noise is drawn from."""

from torch import Tensor
from torch.nn.functional import normalize

from cl_ray.losses.contrastive import gather_keys, widen

SHARPNESS = 2.0
"""Wang and Isola's t; the value of all their experiments."""


def uniformity(latents: Tensor, present: Tensor) -> Tensor:
    """Compute the log of the mean Gaussian potential between directions of latent vectors.

    Wang and Isola (2020), equation 5, for each vector against all others of the global batch, so
    that it is a mean over pairs like every other loss. It is least for a uniform distribution.

    Args:
        latents: [k, b, d], k vectors of each of this rank's b pairs.
        present: Bool [b], false for padding; padding does not count as another vector.

    Returns:
        [b], in [-4 t, 0], the mean over each pair's k vectors; 0 without another vector.
    """
    parts, local = latents.shape[:2]
    directions = normalize(latents, dim=2)
    keys = gather_keys(directions, present, queries=parts)
    cosine = directions.flatten(0, 1) @ keys.vectors.T
    potential = widen(SHARPNESS * (2 * cosine - 2))  # |u - v|^2 = 2 - 2 u v
    number = keys.allowed.sum(1)
    potential = potential.masked_fill(~keys.allowed, float("-inf"))
    potential = potential.masked_fill((number == 0)[:, None], 0)  # finite; masked at the end
    log_mean = potential.logsumexp(1) - number.clamp(min=1).to(potential.dtype).log()
    return log_mean.masked_fill(number == 0, 0).view(parts, local).mean(0)
