"""From one latent vector to another on the sphere that they lie on."""

import torch
from torch import Tensor


def slerp(start: Tensor, end: Tensor, steps: int) -> Tensor:
    """Spherical linear interpolation (Shoemake, 1985, section 3.3), at even angles.

    Args:
        start: [n, d].
        end: [n, d].
        steps: Points of each way, both ends among them, 2 or more.

    Returns:
        [n, steps, d], of mean square 1, as G takes latent vectors. Where the ends are opposite,
        no way is shorter than another, and one is taken.
    """
    a, b = (torch.nn.functional.normalize(z.double(), dim=1) for z in (start, end))
    away = b - (a * b).sum(1, keepdim=True) * a  # what of b is at a right angle to a
    lost = away.norm(dim=1, keepdim=True) < 1e-6
    any_way = torch.roll(a, 1, dims=1) - (torch.roll(a, 1, dims=1) * a).sum(1, keepdim=True) * a
    aside = torch.nn.functional.normalize(torch.where(lost, any_way, away), dim=1)
    angle = torch.atan2((b * aside).sum(1, keepdim=True), (a * b).sum(1, keepdim=True))
    angles = angle[:, None] * torch.linspace(0, 1, steps, dtype=a.dtype)[:, None]
    points = a[:, None] * angles.cos() + aside[:, None] * angles.sin()
    return (points * start.shape[1] ** 0.5).to(start.dtype)
