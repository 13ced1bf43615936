"""Random views of images: affine maps, smooth warps, erased patches, colours and blur.

The transformations for photographs are those of SimCLR (Chen et al., 2020, appendix A).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample, interpolate

from cl_ray.data.config import ViewConfig

GRID = 4
"""Side of the coarse grids of displacements and of erased cells."""
JITTER_PROBABILITY = 0.8
"""Probability that brightness, contrast, saturation and hue of a view change (SimCLR)."""
BLUR_PROBABILITY = 0.5
"""Probability that a view is blurred (SimCLR)."""
MAX_ASPECT = 4 / 3
"""Largest ratio of a crop's width to its height, and of its height to its width (SimCLR)."""
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the grey of a pixel (ITU-R BT.601)."""


class ViewParams(NamedTuple):
    """Parameters of one view of each of B images.

    Args:
        affine: [B, 2, 3], from output to input coordinates, as `affine_grid` takes them.
        displacement: [B, 2, 4, 4], interpolated smoothly over the image, in half sides.
        keep: [B, 1, 4, 4], 1 where a cell is kept and 0 where it is erased.
        color: [B, 2, 3, 3], the maps of a pixel's colour, and of the image's mean colour that is
            added; both of colours in [0, 1]. [B, 0, 3, 3] if colours stay.
        blur: [B, 1], standard deviations as fractions of the side; [B, 0] without blur.
    """

    affine: Tensor
    displacement: Tensor
    keep: Tensor
    color: Tensor
    blur: Tensor

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
            transformation leaves the others as they are; for photographs more is drawn.
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
    color, blur = torch.empty(count, 0, 3, 3), torch.empty(count, 0)
    if config.photographic:
        uniform = torch.rand(12, count, generator=generator)
        affine = affine @ _crops(config, uniform[:5])
        if config.changes_color:
            color = _color_maps(config, uniform[5:11])
        if config.blur:
            strength = uniform[11:].T / BLUR_PROBABILITY  # uniform again below 1
            blur = torch.where(strength < 1, strength * config.blur, 0)
    return ViewParams(affine, displacement, keep.float(), color, blur)


def _crops(config: ViewConfig, uniform: Tensor) -> Tensor:
    """Return maps [B, 3, 3] of the full side to a crop, which may be flipped, by [5, B] numbers."""
    flip, area, aspect, x, y = uniform
    side = (1 - area * config.crop).sqrt()
    stretch = (MAX_ASPECT ** (aspect - 0.5)).clamp(side, 1 / side)  # no side is longer than 1
    width, height = side * stretch, side / stretch
    left, top = (x * 2 - 1) * (1 - width), (y * 2 - 1) * (1 - height)
    zero, one = torch.zeros_like(side), torch.ones_like(side)
    rows = [torch.where(flip < config.flip, -width, width), zero, left]
    rows += [zero, height, top, zero, zero, one]
    return torch.stack(rows, 1).view(-1, 3, 3)


def _color_maps(config: ViewConfig, uniform: Tensor) -> Tensor:
    """Return `ViewParams.color` by [6, B] numbers.

    Brightness, contrast, hue and saturation change in this order, and a colour is cut to its range
    once, at the end. Hue turns about the grey axis of RGB, which is linear, as in HSV it is not.
    """
    limits = (config.brightness, config.contrast, config.saturation, 2 * math.pi * config.hue)
    changes = (uniform[:4] * 2 - 1) * torch.tensor(limits)[:, None]
    changes = torch.where(uniform[4] < JITTER_PROBABILITY, changes, 0)[..., None, None]
    brightness, contrast, saturation = 1 + changes[:3]
    saturation = torch.where(uniform[5, :, None, None] < config.greyscale, 0, saturation)
    cos, sin = changes[3].cos(), changes[3].sin()
    identity, mean, grey = torch.eye(3), torch.full((3, 3), 1 / 3), torch.tensor(LUMA).expand(3, 3)
    cross = torch.tensor([[0.0, -1.0, 1.0], [1.0, 0.0, -1.0], [-1.0, 1.0, 0.0]]) / math.sqrt(3)
    turn = mean + cos * (identity - mean) + sin * cross  # Rodrigues' formula about (1, 1, 1)
    colors = (grey + saturation * (identity - grey)) @ turn
    return torch.stack([brightness * contrast * colors, brightness * (1 - contrast) * grey], 1)


def apply_views(images: Tensor, views: ViewParams) -> Tensor:
    """Transform images [B, C, H, W] in [-1, 1]; pixels beyond the border repeat the border.

    Erased cells become -1, the background of digits. A grey image, C = 1, changes as one of three
    equal channels does: in brightness and contrast; hue, saturation and greyscale leave it.
    """
    side = images.shape[-2:]
    grid = affine_grid(views.affine, list(images.shape), align_corners=False)
    warp = interpolate(views.displacement, side, mode="bicubic", align_corners=False)
    warped = grid_sample(
        images, grid + warp.permute(0, 2, 3, 1), padding_mode="border", align_corners=False
    )
    if views.color.shape[1]:
        warped = _change_colors(warped, views.color)
    if views.blur.shape[1]:
        down, across = (_blur_matrix(views.blur[:, None], length) for length in side)
        warped = down[:, None] @ warped @ across[:, None].mT
    return (warped + 1) * interpolate(views.keep, side) - 1


def _change_colors(images: Tensor, color: Tensor) -> Tensor:
    if images.shape[1] == 1:
        color = color[:, :, :1].sum(3, keepdim=True)
    pixels = (images.flatten(2) + 1) / 2
    changed = color[:, 0] @ pixels + color[:, 1] @ pixels.mean(2, keepdim=True)
    return (changed.clamp(0, 1) * 2 - 1).view_as(images)


def _blur_matrix(std: Tensor, side: int) -> Tensor:
    """Return normalized Gaussian weights [B, side, side] for deviations [B, 1, 1]."""
    index = torch.arange(side, device=std.device, dtype=std.dtype)
    distance = (index[:, None] - index) / (std * side).clamp(min=1e-3)
    return torch.softmax(distance.square() / -2, 2)
