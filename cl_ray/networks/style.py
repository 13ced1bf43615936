"""The style-based family: G paints by styles, each layer's at its own scale.

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
from cl_ray.networks.resample import enlarge

MAPPING = 4
"""Layers of the mapping network; StyleGAN's 8 are for 512 dimensions."""
STYLE = 128
"""Dimensions of a style w."""
MAPPING_RATE = 0.01
"""The mapping network's learning rate over the others'; StyleGAN's (appendix C)."""
MIXING = 0.9
"""Share of samples of noise whose style changes at some layer in training; StyleGAN's."""
AVERAGED = 4096
"""Styles of noise whose mean is where truncation pulls to."""


class EqualizedLinear(nn.Module):
    """A linear layer whose weights are drawn with unit variance and scaled when used.

    Equalised learning rate (Karras et al., 2018, progressive growing, section 4.1): Adam's steps
    are as long whatever the scale. So the layer learns at `rate` times its optimiser's rate.
    """

    def __init__(self, inputs: int, outputs: int, bias: float = 0.0, rate: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs) / rate)
        self.bias = nn.Parameter(torch.full((outputs,), bias / rate))
        self.scale, self.rate = rate / math.sqrt(inputs), rate

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs] to [B, outputs]."""
        return functional.linear(x, self.weight * self.scale, self.bias * self.rate)


class ModulatedConv(nn.Module):
    """A convolution whose input channels a style scales, [B, in, S, S] to [B, out, S, S].

    StyleGAN2, equations 1 and 3. The scales go onto the input, and what undoes their spread onto
    the output: the same numbers as weights made for each sample, at the price of one convolution.
    """

    def __init__(self, channels: tuple[int, int], size: int, demodulate: bool = True):
        super().__init__()
        inputs, outputs = channels
        self.weight = nn.Parameter(torch.randn(outputs, inputs, size, size))
        self.scale = 1 / math.sqrt(inputs * size**2)
        self.style = EqualizedLinear(STYLE, inputs, bias=1.0)
        self.demodulate = demodulate

    def forward(self, x: Tensor, w: Tensor) -> Tensor:
        """Convolve x by the style w [B, STYLE]."""
        scales = self.style(w).to(x.dtype)
        weight = self.weight * self.scale
        x = x * scales[:, :, None, None]
        x = functional.conv2d(x, weight, padding=weight.shape[-1] // 2)
        if self.demodulate:
            power = scales.square() @ weight.square().sum((2, 3)).T.to(x.dtype)
            x = x * torch.rsqrt(power + 1e-8)[:, :, None, None]
        return x


class StyleLayer(nn.Module):
    """Convolve by a style, add noise, bias and bend."""

    noise: Tensor

    def __init__(self, channels: tuple[int, int], side: int):
        super().__init__()
        self.side = side
        self.convolution = ModulatedConv(channels, 3)
        self.strength = nn.Parameter(torch.zeros(()))
        self.bias = nn.Parameter(torch.zeros(channels[1]))
        self.register_buffer("noise", torch.randn(side * side))

    def forward(self, x: Tensor, w: Tensor, noise: Tensor | None) -> Tensor:
        """[B, in, side, side] to [B, out, side, side]; `noise` [B, side^2], or one for all."""
        x = self.convolution(x, w)
        drawn = self.noise if noise is None else noise
        x = x + self.strength * drawn.to(x.dtype).view(-1, 1, self.side, self.side)
        x = x + self.bias[None, :, None, None]
        return functional.leaky_relu(x, 0.2) * math.sqrt(2)


class StyleDecoder(nn.Module):
    """Vectors [B, inputs] to images [B, C, S, S] in [-1, 1].

    In training a sample also takes `extras` normal numbers: every layer's noise, a second vector
    and two numbers that decide from which layer on, and whether, that one's style takes over.
    Without them the noise is the same for all samples and there is no mixing.

    Args:
        inputs: Numbers of a latent vector.
        plan: Sides and channels.
    """

    def __init__(self, inputs: int, plan: ResolutionLayout):
        super().__init__()
        sizes = [inputs, *[STYLE] * MAPPING]
        self.inputs = inputs
        self.mapping = nn.ModuleList(
            EqualizedLinear(a, b, rate=MAPPING_RATE) for a, b in pairwise(sizes)
        )
        self.start = nn.Parameter(torch.randn(plan.deepest))
        levels = list(reversed(range(1, plan.depth + 1)))  # of what comes out; level 0 joins 1
        sides = [plan.sides[-1], *(plan.sides[level - 1] for level in levels)]
        channels = [plan.channels[-1], *(plan.channels[max(level - 1, 1)] for level in levels)]
        inward = [channels[0], *channels[:-1]]
        self.layers = nn.ModuleList(
            StyleLayer((a, b), side) for a, b, side in zip(inward, channels, sides, strict=True)
        )
        self.enlarge = nn.ModuleList(enlarge(a, b) for a, b in pairwise([sides[0], *sides]))
        self.images = nn.ModuleList(
            ModulatedConv((width, plan.channels[0]), 1, demodulate=False) for width in channels
        )
        self.bias = nn.Parameter(torch.zeros(plan.channels[0]))
        self.pixels = StretchedTanh()
        self.ends = list(accumulate(side * side for side in sides))
        self.extras = self.ends[-1] + inputs + 2

    def styles(self, latents: Tensor) -> Tensor:
        """Vectors [B, inputs] to styles w [B, STYLE]."""
        w = latents
        for layer in self.mapping:
            w = functional.leaky_relu(layer(w), 0.2) * math.sqrt(2)
        return w

    def average(self, kind: Tensor | None = None) -> Tensor:
        """The mean style of noise, [STYLE], from a fixed seed; with kinds [B, inputs], each's."""
        random = torch.Generator().manual_seed(0)
        drawn = torch.randn(AVERAGED, self.inputs, generator=random)
        drawn = to_sphere(drawn).to(self.start.device, self.start.dtype)
        if kind is None:
            return self.styles(drawn).mean(0)
        kinds, which = kind.unique(dim=0, return_inverse=True)
        return torch.stack([self.styles(drawn + one).mean(0) for one in kinds])[which]

    def forward(
        self,
        latents: Tensor,
        extras: Tensor | None = None,
        truncation: float = 1.0,
        kind: Tensor | None = None,
    ) -> Tensor:
        """Paint, with styles at `truncation` of their distance to the mean style.

        `kind` [B, inputs], a class's vector, is added to all vectors that styles are made of.
        """
        w = self.styles(latents if kind is None else latents + kind)
        if truncation < 1:
            mean = self.average(kind)
            w = mean + truncation * (w - mean)
        several = [w] * len(self.layers)
        if extras is not None:
            second = to_sphere(extras[:, self.ends[-1] : -2])
            other = self.styles(second if kind is None else second + kind)
            several = self._mixed(w, other, extras)
        x = self.start.to(w.dtype).expand(w.shape[0], -1, -1, -1)  # len() would be traced as fixed
        image: Tensor | None = None
        begin = 0
        for larger, layer, to_image, w, end in zip(
            self.enlarge, self.layers, self.images, several, self.ends, strict=True
        ):
            x = layer(larger(x), w, None if extras is None else extras[:, begin:end])
            drawn = to_image(x, w)
            image = drawn if image is None else larger(image) + drawn
            begin = end
        assert image is not None, "a plan has a level or more"
        return self.pixels(image + self.bias[None, :, None, None])

    def _mixed(self, w: Tensor, other: Tensor, extras: Tensor) -> list[Tensor]:
        """Each layer's style: w, and from some layer on the other in a share MIXING of samples."""
        mixes = torch.special.ndtr(extras[:, -1]) < MIXING
        layers = len(self.layers)
        begins = 1 + (torch.special.ndtr(extras[:, -2]) * (layers - 1)).long()
        begins = torch.where(mixes, begins, layers)
        return [torch.where((begins <= n)[:, None], other, w) for n in range(layers)]
