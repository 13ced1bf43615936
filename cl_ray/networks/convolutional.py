"""The convolutional family: strided convolutions down, transposed convolutions up.

After DCGAN (Radford et al., 2015, section 3), without BatchNorm, which would couple the samples of
a batch and make the result depend on the number of workers. G's decoder normalizes the channels of
each pixel instead (pixel norm: Karras et al., 2018, section 4.2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_ray.networks.activation import StretchedTanh
from cl_ray.networks.layout import ResolutionLayout


class PixelNorm(nn.Module):
    """Scale the channels of each pixel of [B, C, H, W] to unit mean square."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize."""
        scale = torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)
        return x * scale.to(x.dtype)  # a GPU's autocast computes rsqrt in float32


class ImageConv(nn.Conv2d):
    """A 4x4 convolution of stride 2 and padding 1, computed as a 2x2 one over 2x2 cells.

    Weights [out, in, 4, 4] and result are those of `Conv2d`. On one or three channels, the gradient
    with respect to the image, which every step of G needs, takes oneDNN many times as long in the
    plain form.
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=4, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Convolve [B, C, S, S] to [B, out, S // 2, S // 2]."""
        end = 1 - images.shape[-1] % 2  # an odd side ends with the last whole cell
        padded = functional.pad(images, (1, end, 1, end))
        cells = functional.pixel_unshuffle(padded, 2)
        kernel = functional.pixel_unshuffle(self.weight, 2)
        return functional.conv2d(
            cells.contiguous(memory_format=torch.channels_last), kernel, self.bias
        )


class CellConvTranspose(nn.ConvTranspose2d):
    """A 4x4 transposed convolution of stride 2 and padding 1, computed as a 2x2 one to 2x2 cells.

    Weights [in, out, 4, 4] and result are those of `ConvTranspose2d`. To an image, or with an odd
    side, oneDNN takes up to eight times as long in the plain form.
    """

    def __init__(self, in_channels: int, out_channels: int, odd: int):
        super().__init__(in_channels, out_channels, 4, stride=2, padding=1, output_padding=odd)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve [B, in, S, S] to [B, out, 2 S + odd, 2 S + odd]."""
        inputs, outputs = self.weight.shape[:2]
        kernel = self.weight.view(inputs, outputs, 2, 2, 2, 2).flip(2, 4)
        kernel = kernel.permute(3, 5, 1, 0, 2, 4).reshape(4 * outputs, inputs, 2, 2)
        assert self.bias is not None
        cells = functional.conv2d(x, kernel, self.bias.repeat(4), padding=1)
        batch, _, cells_high, cells_wide = cells.shape
        cells = cells.permute(0, 2, 3, 1).view(batch, cells_high, cells_wide, 2, 2, outputs)
        images = cells.transpose(2, 3).reshape(batch, 2 * cells_high, 2 * cells_wide, outputs)
        end = -1 + self.output_padding[0] or None
        return images[:, 1:end, 1:end].permute(0, 3, 1, 2)


def convolutional_trunk(layout: ResolutionLayout) -> nn.Sequential:
    """Build the trunk from images [B, C, S, S] to features [B, layout.flat]."""
    layers: list[nn.Module] = []
    for level in range(layout.depth):
        channels = layout.channels[level], layout.channels[level + 1]
        if layout.sides[level + 1] == layout.sides[level]:
            layers.append(nn.Conv2d(*channels, kernel_size=3, padding=1))
        elif level == 0:
            layers.append(ImageConv(*channels))
        else:
            layers.append(nn.Conv2d(*channels, kernel_size=4, stride=2, padding=1))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
    return nn.Sequential(*layers, nn.Flatten())


def convolutional_decoder(inputs: int, layout: ResolutionLayout) -> nn.Sequential:
    """Build the decoder from vectors [B, inputs] to images [B, C, S, S]: the trunk reversed."""
    layers: list[nn.Module] = [
        nn.Unflatten(1, layout.deepest),
        PixelNorm(),
        nn.LeakyReLU(0.2, inplace=True),
    ]
    for level in reversed(range(layout.depth)):
        channels = layout.channels[level + 1], layout.channels[level]
        if layout.sides[level + 1] == layout.sides[level]:
            layers.append(nn.Conv2d(*channels, kernel_size=3, padding=1))
        else:
            odd = layout.sides[level] % 2  # side s becomes 2 s, or 2 s + 1 with one row more
            if odd or level == 0:
                layers.append(CellConvTranspose(*channels, odd))
            else:
                layers.append(nn.ConvTranspose2d(*channels, 4, stride=2, padding=1))
        layers += [PixelNorm(), nn.LeakyReLU(0.2, inplace=True)] if level else [StretchedTanh()]
    return nn.Sequential(nn.Linear(inputs, layout.flat), nn.Sequential(*layers))
