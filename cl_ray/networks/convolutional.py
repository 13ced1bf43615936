"""The convolutional family: strided convolutions down, transposed convolutions up.

After DCGAN (Radford et al., 2015, section 3), without its BatchNorm, which would couple the
samples of a batch, and those of one worker to each other but not to another's. G's decoder
normalises the channels of each pixel instead (pixel norm: Karras et al., 2018, section 4.2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_ray.networks.activation import StretchedTanh
from cl_ray.networks.layout import ResolutionLayout


class PixelNorm(nn.Module):
    """Scale each pixel's channels to unit mean square: [B, C, H, W] to the same."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


class ImageConv(nn.Conv2d):
    """A 4x4 convolution of stride 2 and padding 1, computed as a 2x2 one over 2x2 cells.

    The same numbers as `Conv2d`'s, from the same weights [out, in, 4, 4]. With the one or three
    channels of an image, the gradient towards the image, which every step of G needs, takes
    oneDNN many times as long in the plain form.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=4, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, S, S] to [B, out, S // 2, S // 2]."""
        beyond = 1 - images.shape[-1] % 2  # an odd side ends with the last whole cell
        padded = functional.pad(images, (1, beyond, 1, beyond))
        cells = functional.pixel_unshuffle(padded, 2)
        kernel = functional.pixel_unshuffle(self.weight, 2)
        return functional.conv2d(
            cells.contiguous(memory_format=torch.channels_last), kernel, self.bias
        )


def convolutional_trunk_layer(plan: ResolutionLayout) -> nn.Sequential:
    """Images [B, C, S, S] to flat maps [B, plan.flat]."""
    layers: list[nn.Module] = []
    for level in range(plan.depth):
        channels = plan.channels[level], plan.channels[level + 1]
        if plan.sides[level + 1] < plan.sides[level]:
            layers.append(
                nn.Conv2d(*channels, kernel_size=4, stride=2, padding=1)
                if level
                else ImageConv(*channels)
            )
        else:
            layers.append(nn.Conv2d(*channels, kernel_size=3, padding=1))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(*layers, nn.Flatten())


def up(plan: ResolutionLayout) -> nn.Sequential:
    """Flat maps [B, plan.flat] to images [B, C, S, S] in [-1, 1]: `down`, backwards."""
    layers: list[nn.Module] = [
        nn.Unflatten(1, plan.deepest),
        PixelNorm(),
        nn.LeakyReLU(0.2, inplace=True),
    ]
    for level in reversed(range(plan.depth)):
        channels = plan.channels[level + 1], plan.channels[level]
        if plan.sides[level + 1] < plan.sides[level]:
            odd = plan.sides[level] % 2  # 4x4, stride 2 makes 2s; one row more makes 2s + 1
            layers.append(nn.ConvTranspose2d(*channels, 4, stride=2, padding=1, output_padding=odd))
        else:
            layers.append(nn.Conv2d(*channels, kernel_size=3, padding=1))
        layers += [PixelNorm(), nn.LeakyReLU(0.2, inplace=True)] if level else [StretchedTanh()]
    return nn.Sequential(*layers)


def convolutional_decoder(inputs: int, plan: ResolutionLayout) -> nn.Sequential:
    """Vectors [B, inputs] to images [B, C, S, S] in [-1, 1]."""
    return nn.Sequential(nn.Linear(inputs, plan.flat), up(plan))
