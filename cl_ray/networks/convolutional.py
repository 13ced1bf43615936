"""The convolutional family: strided convolutions down, transposed convolutions up.

After DCGAN (Radford et al., 2015, section 3), without its BatchNorm, which would couple the
samples of a batch, and those of one worker to each other but not to another's. G's decoder
normalises the channels of each pixel instead (pixel norm: Karras et al., 2018, section 4.2).
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from cl_ray.networks.config import DiscriminatorConfig, GeneratorConfig

SMALLEST = 6
"""A side of fewer pixels than this is not halved again."""


class Plan:
    """Sides and channels, level by level, of a stack of `depth` convolutions.

    The first convolutions halve the side while it is at least SMALLEST and double the channels,
    up to 8 times `width`; the rest keep both.
    """

    def __init__(self, side: int, channels: int, depth: int, width: int):
        self.sides, self.channels = [side], [channels]
        for level in range(depth):
            halve = self.sides[-1] >= SMALLEST
            self.sides.append(self.sides[-1] // 2 if halve else self.sides[-1])
            last = self.channels[-1]
            self.channels.append((width * min(2**level, 8)) if halve or level == 0 else last)

    @property
    def flat(self) -> int:
        """Numbers in one image's deepest map."""
        return self.channels[-1] * self.sides[-1] ** 2


class PixelNorm(nn.Module):
    """Scale each pixel's channels to unit mean square: [B, C, H, W] to the same."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6)


class ImageConv(nn.Conv2d):
    """A 4x4 convolution of stride 2 and padding 1, computed as a 2x2 one over 2x2 cells.

    The same numbers as `Conv2d`'s, from the same weights [out, in, 4, 4]. With the one or three
    channels of an image, the gradient towards the image, which every step of G needs, takes
    oneDNN many times as long in the plain form (benchmarks/README.md).
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


def down(plan: Plan) -> nn.Sequential:
    """Images [B, C, S, S] to flat maps [B, plan.flat]."""
    layers: list[nn.Module] = []
    for level in range(len(plan.sides) - 1):
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


def up(plan: Plan) -> nn.Sequential:
    """Flat maps [B, plan.flat] to images [B, C, S, S] in [-1, 1]: `down`, backwards."""
    deepest = plan.channels[-1], plan.sides[-1], plan.sides[-1]
    layers: list[nn.Module] = [
        nn.Unflatten(1, deepest),
        PixelNorm(),
        nn.LeakyReLU(0.2, inplace=True),
    ]
    for level in reversed(range(len(plan.sides) - 1)):
        channels = plan.channels[level + 1], plan.channels[level]
        if plan.sides[level + 1] < plan.sides[level]:
            odd = plan.sides[level] % 2  # 4x4, stride 2 makes 2s; one row more makes 2s + 1
            layers.append(nn.ConvTranspose2d(*channels, 4, stride=2, padding=1, output_padding=odd))
        else:
            layers.append(nn.Conv2d(*channels, kernel_size=3, padding=1))
        layers += [PixelNorm(), nn.LeakyReLU(0.2, inplace=True)] if level else [nn.Tanh()]
    return nn.Sequential(*layers)


class ConvolutionalGenerator(nn.Module):
    """G: `encode` an image to a latent vector, `decode` a latent vector to an image.

    Args:
        shape: Height, width and channels of an image.
        config: Depth, width and latent dimensions.
    """

    def __init__(self, shape: tuple[int, int, int], config: GeneratorConfig):
        super().__init__()
        plan = Plan(shape[0], shape[2], config.depth, config.width)
        self.jitter = config.jitter
        self.encoder = nn.Sequential(down(plan), nn.Linear(plan.flat, config.latent))
        self.decoder = nn.Sequential(nn.Linear(config.latent, plan.flat), up(plan))
        self.apply(_initialize)

    def encode(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to latent vectors [B, latent] of mean square 1.

        Noise lies near the same sphere, so the decoder sees one kind of input.
        """
        z = self.encoder(images)
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-6)

    def decode(self, latents: Tensor) -> Tensor:
        """Latent vectors [B, latent] to images [B, C, H, W] in [-1, 1]."""
        return self.decoder(latents * torch.rsqrt(latents.square().mean(1, keepdim=True) + 1e-6))

    def forward(self, images: Tensor, noise: Tensor, moves: Tensor) -> tuple[Tensor, Tensor]:
        """Fakes [B + M, C, H, W] of `images` [B, C, H, W], then of `noise` [M, latent].

        Beside them the images' latent vectors [B, latent], unmoved.

        The images' latent vectors are moved by `moves` [B, latent], unit noise, times the jitter:
        what is decoded near them must still be their images, and so they spread out over the
        sphere that noise lies on (Yue et al., 2026, Sphere Encoder, section 3).
        """
        latents = self.encode(images)
        return self.decode(torch.cat([latents + self.jitter * moves, noise])), latents


class ConvolutionalDiscriminator(nn.Module):
    """D: a trunk of features, a score head and a projection head.

    Args:
        shape: Height, width and channels of an image.
        config: Depth, width, and the projection's dimensions.
    """

    def __init__(self, shape: tuple[int, int, int], config: DiscriminatorConfig):
        super().__init__()
        plan = Plan(shape[0], shape[2], config.depth, config.width)
        self.trunk = down(plan)
        self.score = nn.Linear(plan.flat, 1)
        self.projection = nn.Sequential(
            nn.Linear(plan.flat, config.hidden),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Linear(config.hidden, config.embedding),
        )
        self.apply(_initialize)

    def features(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [-1, 1] to the representation, the deepest map [B, plan.flat]."""
        return self.trunk(images)

    def scores(self, features: Tensor) -> Tensor:
        """Scores [B], high is real, of features [B, plan.flat]."""
        with torch.autocast(features.device.type, enabled=False):  # bfloat16 rounds by 1 in 256
            return self.score(features.to(self.score.weight.dtype)).squeeze(1)

    def embed(self, features: Tensor) -> Tensor:
        """Unit embeddings [B, embedding] of features [B, plan.flat]."""
        return functional.normalize(self.projection(features), dim=1)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [B] (high is real) and unit embeddings [B, embedding] of images [B, C, H, W]."""
        features = self.features(images)
        return self.scores(features), self.embed(features)


def _initialize(module: nn.Module) -> None:
    """He initialisation for leaky rectifiers (He et al., 2015, equation 15), biases zero."""
    if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        if isinstance(module, nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, a=0.2, mode="fan_out")
        else:
            nn.init.kaiming_normal_(module.weight, a=0.2)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
