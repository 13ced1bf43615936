"""How evenly G's encoder spreads images over the sphere that noise is drawn from."""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl_ray.losses.gather import gather_negatives

SHARPNESS = 2.0
"""Wang and Isola's t, the value of all their experiments."""


def uniformity(latents: Tensor, present: Tensor) -> Tensor:
    """The logarithm of the mean Gaussian potential between latent vectors' directions.

    Wang and Isola (2020), equation 5, taken for each vector against all others of the global
    batch, so that it is a mean over pairs like every other loss. Least where they are uniform.

    Args:
        latents: [k, b, d], k vectors of each of this rank's b pairs.
        present: Bool [b], false where a row only fills the last batch up; it is nobody's other.

    Returns:
        [b], from -4 t to 0, the mean of each pair's k; 0 where there is no other.
    """
    parts, local = latents.shape[:2]
    own = normalize(latents, dim=2)
    others, here, itself = gather_negatives(own, present)
    cosine = own.flatten(0, 1) @ others.T
    potential = SHARPNESS * (2 * cosine - 2)  # |u - v|^2 = 2 - 2 u v
    if potential.dtype == torch.bfloat16:
        potential = potential.float()
    counted = here.expand(len(itself), -1).scatter(1, itself[:, None], False)
    number = counted.sum(1)
    potential = potential.masked_fill(~counted, float("-inf"))
    potential = potential.masked_fill((number == 0)[:, None], 0)  # finite, then masked
    mean = potential.logsumexp(1) - number.clamp(min=1).to(potential.dtype).log()
    return mean.masked_fill(number == 0, 0).view(parts, local).mean(0)
