"""The residual family: R3GAN's modern bottleneck blocks.

After R3GAN (Huang et al., 2024, section 3): no normalisation, leaky rectifiers, resampling by a
filter apart from the blocks, grouped convolutions in inverted bottlenecks, and a last convolution
that starts at zero in place of normalisation's help (Fixup: Zhang et al., 2019).
"""

from torch import Tensor, nn
from torch.nn import functional

from cl_ray.networks.activation import StretchedTanh
from cl_ray.networks.layout import ResolutionLayout
from cl_ray.networks.resample import enlarge, halve

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


class ResidualBlock(nn.Module):
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


def residual_trunk(plan: ResolutionLayout) -> nn.Sequential:
    """Images [B, C, S, S] to flat maps [B, plan.flat]: at each level, resample, then a block."""
    first = plan.channels[1]
    layers: list[nn.Module] = [
        nn.Conv2d(plan.channels[0], first, kernel_size=3, padding=1),
        nn.LeakyReLU(0.2),
    ]
    channels = first
    for level in range(1, plan.depth + 1):
        if plan.sides[level] < plan.sides[level - 1]:
            layers.append(halve(plan.sides[level - 1]))
        if plan.channels[level] != channels:
            layers.append(nn.Conv2d(channels, plan.channels[level], 1, bias=False))
            channels = plan.channels[level]
        layers.append(ResidualBlock(channels, plan.depth))
    return nn.Sequential(*layers, nn.Flatten())


def residual_decoder(inputs: int, plan: ResolutionLayout) -> nn.Sequential:
    """Vectors [B, inputs] to images [B, C, S, S] in [-1, 1]: `trunk`, backwards."""
    channels = plan.channels[-1]
    layers: list[nn.Module] = [nn.Linear(inputs, plan.flat), nn.Unflatten(1, plan.deepest)]
    for level in reversed(range(1, plan.depth + 1)):
        layers.append(ResidualBlock(channels, plan.depth))
        after = plan.channels[max(level - 1, 1)]
        if after != channels:
            layers.append(nn.Conv2d(channels, after, 1, bias=False))
            channels = after
        if plan.sides[level] < plan.sides[level - 1]:
            layers.append(enlarge(plan.sides[level], plan.sides[level - 1]))
    layers += [
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, plan.channels[0], 3, padding=1),
        StretchedTanh(),
    ]
    return nn.Sequential(*layers)
