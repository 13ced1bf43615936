"""The residual family: R3GAN's bottleneck blocks.

After R3GAN (Huang et al., 2024, section 3): no normalization, leaky ReLU, resampling by a filter
outside the blocks, grouped convolutions in inverted bottlenecks, and a last convolution that starts
at zero instead of normalization (Fixup: Zhang et al., 2019).
"""

from torch import Tensor, nn
from torch.nn import functional

from cl_ray.networks.activation import StretchedTanh
from cl_ray.networks.layout import ResolutionLayout
from cl_ray.networks.resample import downsample, upsample

GROUP_WIDTH = 16
"""Channels per group of the 3x3 convolution, as in R3GAN."""
EXPANSION = 2
"""Channels inside a block per channel outside."""


class ZeroConv(nn.Conv2d):
    """A 1x1 convolution without bias whose weights start at zero."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=1, bias=False)


class FixupConv(nn.Conv2d):
    """A convolution whose initial weights are He's times `gain`."""

    def __init__(self, channels: tuple[int, int], size: int, gain: float, groups: int = 1):
        super().__init__(*channels, kernel_size=size, padding=size // 2, groups=groups)
        self.gain = gain


class ResidualBlock(nn.Module):
    """x + f(x) of [B, C, S, S]; f is zero at first.

    Args:
        channels: C.
        blocks: Number of blocks of the network; the initial weights inside f are scaled by its
            inverse fourth root (Fixup, for branches of three convolutions).
    """

    def __init__(self, channels: int, blocks: int):
        super().__init__()
        inner, gain = EXPANSION * channels, blocks**-0.25
        groups = inner // GROUP_WIDTH if inner % GROUP_WIDTH == 0 else 1
        self.expand = FixupConv((channels, inner), 1, gain)
        self.mix = FixupConv((inner, inner), 3, gain, groups)
        self.project = ZeroConv(inner, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual branch."""
        y = functional.leaky_relu(self.expand(x), 0.2)
        y = functional.leaky_relu(self.mix(y), 0.2)
        return x + self.project(y)


def residual_trunk(layout: ResolutionLayout) -> nn.Sequential:
    """Build the trunk from images [B, C, S, S] to features [B, layout.flat].

    Each level resamples, then applies a block.
    """
    channels = layout.channels[1]
    layers: list[nn.Module] = [
        nn.Conv2d(layout.channels[0], channels, kernel_size=3, padding=1),
        nn.LeakyReLU(0.2),
    ]
    for level in range(1, layout.depth + 1):
        if layout.sides[level] < layout.sides[level - 1]:
            layers.append(downsample(layout.sides[level - 1]))
        if layout.channels[level] != channels:
            layers.append(nn.Conv2d(channels, layout.channels[level], 1, bias=False))
            channels = layout.channels[level]
        layers.append(ResidualBlock(channels, layout.depth))
    return nn.Sequential(*layers, nn.Flatten())


def residual_decoder(inputs: int, layout: ResolutionLayout) -> nn.Sequential:
    """Build the decoder from vectors [B, inputs] to images [B, C, S, S]: the trunk reversed."""
    channels = layout.channels[-1]
    layers: list[nn.Module] = [nn.Linear(inputs, layout.flat), nn.Unflatten(1, layout.deepest)]
    for level in reversed(range(1, layout.depth + 1)):
        layers.append(ResidualBlock(channels, layout.depth))
        outer = layout.channels[max(level - 1, 1)]
        if outer != channels:
            layers.append(nn.Conv2d(channels, outer, 1, bias=False))
            channels = outer
        if layout.sides[level] < layout.sides[level - 1]:
            layers.append(upsample(layout.sides[level], layout.sides[level - 1]))
    return nn.Sequential(
        *layers,
        nn.LeakyReLU(0.2),
        nn.Conv2d(channels, layout.channels[0], 3, padding=1),
        StretchedTanh(),
    )
