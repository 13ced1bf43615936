"""The style-based family: a style vector modulates each layer of G's decoder.

After StyleGAN (Karras et al., 2018, section 2: mapping network, per-layer noise, style mixing,
truncation) in the form of StyleGAN2 (Karras et al., 2020, section 2: modulated and demodulated
convolutions, summed outputs in place of growing). Its D is the residual family's trunk, as
StyleGAN2's is residual (section 4.1).
"""

import math
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_ray.networks.activation import StretchedTanh
from cl_ray.networks.generator import to_sphere
from cl_ray.networks.layout import ResolutionLayout
from cl_ray.networks.resample import upsample

MAPPING_LAYERS = 4
"""Layers of the mapping network; StyleGAN's 8 are for 512 dimensions."""
STYLE_DIM = 128
"""Dimensions of a style w."""
MAPPING_LR_SCALE = 0.01
"""Learning rate of the mapping network relative to the other layers; StyleGAN's (appendix C)."""
MIXING_PROBABILITY = 0.9
"""Probability that a training sample of noise mixes two styles; StyleGAN's."""
MEAN_STYLE_SAMPLES = 4096
"""Number of noise vectors whose mean style is the center of truncation."""


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are drawn with unit variance and scaled at run time.

    Equalized learning rate (Karras et al., 2018, progressive growing, section 4.1): the size of
    Adam's steps does not depend on the scale. The layer learns at `lr_scale` times the optimizer's
    learning rate.
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, lr_scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / lr_scale)
        self.bias = nn.Parameter(torch.full((outputs,), bias / lr_scale))
        self.scale, self.lr_scale = lr_scale / math.sqrt(inputs), lr_scale

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs] to [B, outputs]."""
        return functional.linear(x, self.weight * self.scale, self.bias * self.lr_scale)


class ModulatedConv(nn.Module):
    """A convolution [B, in, S, S] to [B, out, S, S] whose input channels are scaled by a style.

    StyleGAN2, equations 1 and 3. Scaling the input, and demodulating the output, gives the same
    result as separate weights for each sample, with one convolution for all.
    """

    def __init__(self, channels: tuple[int, int], size: int, demodulate: bool = True):
        super().__init__()
        inputs, outputs = channels
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.scale = 1 / math.sqrt(inputs * size**2)
        self.style = EqualizedLinear(STYLE_DIM, inputs, bias=1.0)
        self.demodulate = demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Convolve x with the style w [B, STYLE_DIM]."""
        scales = self.style(w).to(x.dtype)
        weight = self.weight * self.scale
        x = x * scales[:, :, None, None]
        x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2)
        if self.demodulate:
            power = scales.square() @ weight.square().sum((2, 3)).T.to(x.dtype)
            scale = torch.rsqrt(power + 1e-8).to(x.dtype)  # float32 in a GPU's autocast
            x = x * scale[:, :, None, None]
        return x


class StyleLayer(nn.Module):
    """A modulated convolution, then noise, bias and leaky ReLU."""

    noise: Tensor

    def __init__(self, channels: tuple[int, int], side: int):
        super().__init__()
        self.side = side
        self.convolution = ModulatedConv(channels, 3)
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(channels[1]))
        self.register_buffer("noise", torch.randn(side * side))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """Map [B, in, side, side] to [B, out, side, side].

        `noise` is [B, side^2]; None uses the layer's fixed noise for all samples.
        """
        x = self.convolution(x, w)
        noise = self.noise if noise is None else noise
        x = x + self.strength * noise.to(x.dtype).view(-1, 1, self.side, self.side)
        x = x + self.bias.to(x.dtype)[None, :, None, None]
        return functional.leaky_relu(x, 0.2) * math.sqrt(2)


class StyleDecoder(nn.Module):
    """Maps vectors [B, inputs] to images [B, C, S, S] in [-1, 1].

    In training a sample also takes `noise_dim` normal numbers: the noise of every layer, a second
    latent vector, and two numbers that decide from which layer on, and whether, the second style
    replaces the first. Without them the noise is fixed and styles are not mixed.

    Args:
        inputs: Dimensions of a latent vector.
        layout: Side lengths and channels.
    """

    def __init__(self, inputs: int, layout: ResolutionLayout):
        super().__init__()
        sizes = [inputs, *[STYLE_DIM] * MAPPING_LAYERS]
        self.inputs = inputs
        self.mapping = nn.ModuleList(
            EqualizedLinear(a, b, lr_scale=MAPPING_LR_SCALE) for a, b in pairwise(sizes)
        )
        self.start = nn.Parameter(torch.randn(layout.deepest))
        levels = list(reversed(range(1, layout.depth + 1)))  # of a layer's output; 0 joins 1
        sides = [layout.sides[-1], *(layout.sides[level - 1] for level in levels)]
        channels = [layout.channels[-1], *(layout.channels[max(n - 1, 1)] for n in levels)]
        input_channels = [channels[0], *channels[:-1]]
        self.layers = nn.ModuleList(
            StyleLayer((a, b), side)
            for a, b, side in zip(input_channels, channels, sides, strict=True)
        )
        self.upsample = nn.ModuleList(upsample(a, b) for a, b in pairwise([sides[0], *sides]))
        self.to_image = nn.ModuleList(
            ModulatedConv((width, layout.channels[0]), 1, demodulate=False) for width in channels
        )
        self.bias = nn.Parameter(torch.zeros(layout.channels[0]))
        self.activation = StretchedTanh()
        self.noise_ends = list(accumulate(side * side for side in sides))
        self.noise_dim = self.noise_ends[-1] + inputs + 2

    def styles(self, latents: Tensor) -> Tensor:
        """Map vectors [B, inputs] to styles w [B, STYLE_DIM]."""
        w = latents
        for layer in self.mapping:
            w = functional.leaky_relu(layer(w), 0.2) * math.sqrt(2)
        return w

    def mean_style(self, class_vectors: Tensor | None = None) -> Tensor:
        """Compute the mean style of noise from a fixed seed, [STYLE_DIM].

        With `class_vectors` [B, inputs], the mean style of each one's class, [B, STYLE_DIM].
        """
        random = torch.Generator().manual_seed(0)
        noise = torch.randn(MEAN_STYLE_SAMPLES, self.inputs, generator=random)
        noise = to_sphere(noise).to(self.start.device, self.start.dtype)
        if class_vectors is None:
            return self.styles(noise).mean(0)
        distinct, index = class_vectors.unique(dim=0, return_inverse=True)
        return torch.stack([self.styles(noise + one).mean(0) for one in distinct])[index]

    def forward(
        self,
        latents: Tensor,
        noise: Tensor | None = None,
        truncation: float = 1.0,
        class_vectors: Tensor | None = None,
    ) -> Tensor:
        """Decode.

        Args:
            latents: [B, inputs].
            noise: Normal numbers [B, noise_dim].
            truncation: In [0, 1]; factor of the distance of styles from the mean style.
            class_vectors: [B, inputs], added to every latent vector that styles are mapped from.
        """
        w = self.styles(latents if class_vectors is None else latents + class_vectors)
        if truncation < 1:
            mean = self.mean_style(class_vectors)
            w = mean + truncation * (w - mean)
        styles = [w] * len(self.layers)
        if noise is not None:
            second = to_sphere(noise[:, self.noise_ends[-1] : -2])
            second = second if class_vectors is None else second + class_vectors
            styles = self.mix_styles(w, self.styles(second), noise)
        x = self.start.to(w.dtype).expand(w.shape[0], -1, -1, -1)  # len() would be traced as fixed
        image: Tensor | None = None
        begin = 0
        for larger, layer, to_image, w, end in zip(
            self.upsample, self.layers, self.to_image, styles, self.noise_ends, strict=True
        ):
            x = layer(larger(x), w, None if noise is None else noise[:, begin:end])
            output = to_image(x, w)
            image = output if image is None else larger(image) + output
            begin = end
        assert image is not None, "a layout has one level or more"
        return self.activation(image + self.bias[None, :, None, None])

    def mix_styles(self, w: Tensor, second: Tensor, noise: Tensor) -> list[Tensor]:
        """Return each layer's styles [B, STYLE_DIM]: w, or from a random layer on `second`."""
        mixes = torch.special.ndtr(noise[:, -1]) < MIXING_PROBABILITY
        layers = len(self.layers)
        start = 1 + (torch.special.ndtr(noise[:, -2]) * (layers - 1)).long()
        start = torch.where(mixes, start, layers)
        return [torch.where((start <= n)[:, None], second, w) for n in range(layers)]
