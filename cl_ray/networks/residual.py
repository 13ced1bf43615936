"""The residual family: R3GAN's modern bottleneck blocks.

After R3GAN (Huang et al., 2024, section 3): no normalisation, leaky rectifiers, resampling by a
filter apart from the blocks, grouped convolutions in inverted bottlenecks, and a last convolution
that starts at zero in place of normalisation's help (Fixup: Zhang et al., 2019).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_ray.networks.pixels import Pixels
from cl_ray.networks.plan import Plan

GROUP = 16
"""Channels of a group of the 3x3 convolution; R3GAN's."""
EXPANSION = 2
"""Channels inside a block for each outside."""


class ZeroConv(nn.Conv2d):
    """A 1x1 convolution without bias whose weights start at zero."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=False)


class FixupConv(nn.Conv2d):
    """A convolution whose weights start at He's spread times `gain`."""

    def __init__(self, channels: tuple[int, int], size: int, gain: float, groups: int = 1):
        super().__init__(*channels, kernel_size=size, padding=size // 2, groups=groups)
        self.gain = gain


class Block(nn.Module):
    """x + f(x), [B, C, S, S] to the same; f is zero at first.

    Args:
        channels: C.
        blocks: How many the network has: f's inner weights start smaller by the fourth root of
            that (Fixup, for branches of three convolutions).
    """

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        inner, gain = EXPANSION * channels, blocks**-0.25
        groups = inner // GROUP if inner % GROUP == 0 else 1
        self.expand = FixupConv((channels, inner), 1, gain)
        self.mix = FixupConv((inner, inner), 3, gain, groups)
        self.project = ZeroConv(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add the branch."""
        y = functional.leaky_relu(self.expand(x), 0.2)
        y = functional.leaky_relu(self.mix(y), 0.2)
        return x + self.project(y)


class Down(nn.Module):
    """Halve the side, rounded down, by the binomial filter 1 3 3 1: [B, C, S, S] to half of it."""

    filter: Tensor

    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        self.register_buffer("filter", torch.outer(line, line)[None, None], persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Filter, then take every second pixel."""
        channels = x.shape[1]
        kernel = self.filter.to(x.dtype).expand(channels, 1, 4, 4)
        padded = functional.pad(x, (1, 1, 1, 1), mode="replicate")
        return functional.conv2d(padded, kernel, stride=2, groups=channels)


class Up(nn.Module):
    """`enlarge` to a side, as a layer."""

    def __init__(self, side: int):
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        """Interpolate."""
        return enlarge(x, self.side)


def enlarge(x: Tensor, side: int) -> Tensor:
    """[B, C, s, s] to [B, C, side, side], bilinear: to twice the side, the filter 1 3 3 1."""
    if x.shape[-1] == side:
        return x
    return functional.interpolate(x, (side, side), mode="bilinear")


def trunk(plan: Plan) -> nn.Sequential:
    """Images [B, C, S, S] to flat maps [B, plan.flat]: at each level, resample, then a block."""
    first = plan.channels[1]
    layers: list[nn.Module] = [
        nn.Conv2d(plan.channels[0], first, kernel_size=3, padding=1),
        nn.LeakyReLU(0.2),
    ]
    channels = first
    for level in range(1, plan.depth + 1):
        if plan.sides[level] < plan.sides[level - 1]:
            layers.append(Down())
        if plan.channels[level] != channels:
            layers.append(nn.Conv2d(channels, plan.channels[level], 1, bias=False))
            channels = plan.channels[level]
        layers.append(Block(channels, plan.depth))
    return nn.Sequential(*layers, nn.Flatten())


def decoder(inputs: int, plan: Plan) -> nn.Sequential:
    """Vectors [B, inputs] to images [B, C, S, S] in [-1, 1]: `trunk`, backwards."""
    channels = plan.channels[-1]
    layers: list[nn.Module] = [nn.Linear(inputs, plan.flat), nn.Unflatten(1, plan.deepest)]
    for level in reversed(range(1, plan.depth + 1)):
        layers.append(Block(channels, plan.depth))
        after = plan.channels[max(level - 1, 1)]
        if after != channels:
            layers.append(nn.Conv2d(channels, after, 1, bias=False))
            channels = after
        if plan.sides[level] < plan.sides[level - 1]:
            layers.append(Up(plan.sides[level - 1]))
    layers += [nn.LeakyReLU(0.2), nn.Conv2d(channels, plan.channels[0], 3, padding=1), Pixels()]
    return nn.Sequential(*layers)
