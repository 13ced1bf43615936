"""Views: random affine maps of images, drawn for the global batch."""

import math

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

from cl_ray.data.config import ViewConfig


def draw_views(config: ViewConfig, count: int, generator: torch.Generator) -> Tensor:
    """Random affine maps.

    Args:
        config: How far a view may go.
        count: How many maps.
        generator: A CPU generator.

    Returns:
        [count, 2, 3] float32, from output to input coordinates, as `affine_grid` takes them.
    """
    angle, x, y, size, shear = torch.rand(5, count, generator=generator) * 2 - 1
    angle = angle * math.radians(config.rotate)
    shear = torch.tan(shear * math.radians(config.shear))
    size = torch.exp(size * -math.log1p(-config.scale))
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    shift = 2 * config.shift  # affine_grid's side is 2 long
    rows = [cos, cos * shear - sin, x * shift, sin, sin * shear + cos, y * shift]
    return torch.stack(rows, 1).view(count, 2, 3)


def view(images: Tensor, maps: Tensor) -> Tensor:
    """Images [B, C, H, W] seen through `maps` [B, 2, 3]; beyond the edge the edge goes on."""
    grid = affine_grid(maps.to(images), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="border", align_corners=False)
