"""Random views of images: affine maps, smooth warps and erased patches."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from cl_ray.data.config import ViewConfig

GRID = 4
"""Side of the coarse grids of displacements and of erased cells."""


class ViewParams(NamedTuple):
    """Parameters of one view of each of B images.

    Args:
        affine: [B, 2, 3], from output to input coordinates, as `affine_grid` takes them.
        displacement: [B, 2, 4, 4], interpolated smoothly over the image, in half sides.
        keep: [B, 1, 4, 4], 1 where a cell is kept and 0 where it is erased.
    """

    affine: Tensor
    displacement: Tensor
    keep: Tensor

    def split(self, count: int) -> tuple["ViewParams", "ViewParams"]:
        """Return the parameters of the first `count` images, and those of the others."""
        first = ViewParams(*(part[:count] for part in self))
        return first, ViewParams(*(part[count:] for part in self))


def sample_views(config: ViewConfig, count: int, generator: torch.Generator) -> ViewParams:
    """Sample the parameters of random views.

    Args:
        config: The largest strength of each transformation.
        count: Number of views.
        generator: A CPU generator. It is used equally for every config, so that changing one
            transformation leaves the others as they are.
    """
    angle, x, y, size, shear = torch.rand(5, count, generator=generator) * 2 - 1
    angle = angle * math.radians(config.rotate)
    shear = torch.tan(shear * math.radians(config.shear))
    size = torch.exp(size * -math.log1p(-config.scale))
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    shift = 2 * config.shift  # coordinates of affine_grid run from -1 to 1
    rows = [cos, cos * shear - sin, x * shift, sin, sin * shear + cos, y * shift]
    affine = torch.stack(rows, 1).view(count, 2, 3)
    displacement = torch.randn(count, 2, GRID, GRID, generator=generator) * config.warp
    keep = torch.rand(count, 1, GRID, GRID, generator=generator) >= config.erase
    return ViewParams(affine, displacement, keep.float())


def apply_views(images: Tensor, views: ViewParams) -> Tensor:
    """Transform images [B, C, H, W] in [-1, 1]; pixels beyond the border repeat the border.

    Erased cells become -1, the background of digits.
    """
    side = images.shape[-2:]
    grid = affine_grid(views.affine, list(images.shape), align_corners=False)
    warp = interpolate(views.displacement, side, mode="bicubic", align_corners=False)
    warped = grid_sample(
        images, grid + warp.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
    )
    return (warped + 1) * interpolate(views.keep, side) - 1
