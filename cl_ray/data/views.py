"""Views: random affine maps, smooth warps and erased patches, drawn for the global batch."""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from cl_ray.data.config import ViewConfig

COARSE = 4
"""Side of the grids that warps and patches are drawn on."""


class ViewParams(NamedTuple):
    """How each of B images is to be seen.

    Args:
        maps: [B, 2, 3], from output to input coordinates, as `affine_grid` takes them.
        warps: [B, 2, 4, 4], displacements to be smoothed over the image, in half sides.
        kept: [B, 1, 4, 4], 1 where a cell stays and 0 where it is blanked out.
    """

    maps: Tensor
    warps: Tensor
    kept: Tensor

    def split(self, count: int) -> tuple["ViewParams", "ViewParams"]:
        """Those of the first so many images, and the others'."""
        return ViewParams(*(part[:count] for part in self)), ViewParams(
            *(part[count:] for part in self)
        )


def sample_views(config: ViewConfig, count: int, generator: torch.Generator) -> ViewParams:
    """Random views.

    Args:
        config: How far a view may go.
        count: How many.
        generator: A CPU generator; all draws are made whatever the config, so that a view's
            parts stay what they are when another part is changed.
    """
    angle, x, y, size, shear = torch.rand(5, count, generator=generator) * 2 - 1
    angle = angle * math.radians(config.rotate)
    shear = torch.tan(shear * math.radians(config.shear))
    size = torch.exp(size * -math.log1p(-config.scale))
    cos, sin = torch.cos(angle) / size, torch.sin(angle) / size
    shift = 2 * config.shift  # affine_grid's side is 2 long
    rows = [cos, cos * shear - sin, x * shift, sin, sin * shear + cos, y * shift]
    maps = torch.stack(rows, 1).view(count, 2, 3)
    warps = torch.randn(count, 2, COARSE, COARSE, generator=generator) * config.warp
    kept = torch.rand(count, 1, COARSE, COARSE, generator=generator) >= config.erase
    return ViewParams(maps, warps, kept.float())


def apply_views(images: Tensor, views: ViewParams) -> Tensor:
    """Images [B, C, H, W] in [-1, 1] as `views` show them; beyond the edge the edge goes on.

    Erased cells become -1, the background of digits.
    """
    side = images.shape[-2:]
    grid = affine_grid(views.maps, list(images.shape), align_corners=False)
    warp = interpolate(views.warps, side, mode="bicubic", align_corners=False)
    seen = grid_sample(
        images, grid + warp.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
    )
    return (seen + 1) * interpolate(views.kept, side) - 1
