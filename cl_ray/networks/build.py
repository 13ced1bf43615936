"""Build G and D from the config. A network family is one entry of FAMILIES."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.utils import parametrizations

from cl_ray.networks.config import DiscriminatorConfig, GeneratorConfig
from cl_ray.networks.convolutional import convolutional_decoder, convolutional_trunk
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator
from cl_ray.networks.layout import ResolutionLayout
from cl_ray.networks.residual import FixupConv, ZeroConv, residual_decoder, residual_trunk
from cl_ray.networks.style import StyleDecoder
from cl_ray.train_config import GANConfig


class NetworkFamily(NamedTuple):
    """Builders of one kind of network.

    Args:
        trunk: Builds the module from images [B, C, S, S] to features [B, layout.flat], for D and
            for G's encoder. They are channels at a resolution, `layout.deepest`, flattened: D
            pools them.
        decoder: Builds the module from vectors [B, inputs] to images [B, C, S, S] in [-1, 1].
    """

    trunk: Callable[[ResolutionLayout], nn.Module]
    decoder: Callable[[int, ResolutionLayout], nn.Module]


FAMILIES = {
    "convolutional": NetworkFamily(convolutional_trunk, convolutional_decoder),
    "residual": NetworkFamily(residual_trunk, residual_decoder),
    "style": NetworkFamily(residual_trunk, StyleDecoder),
}


def build_networks(
    config: GANConfig, shape: tuple[int, int, int], classes: int = 0
) -> tuple[Generator, Discriminator]:
    """Build G and D with random weights.

    Args:
        config: Networks, condition and form of the contrastive loss.
        shape: Height, width and channels of an image.
        classes: Number of classes; 0 unless `config.condition` uses labels.
    """
    is_projection, contrad = config.condition == "projection", config.losses.form == "contrad"
    return (
        build_generator(shape, config.generator, classes),
        build_discriminator(shape, config.discriminator, classes, is_projection, contrad),
    )


def build_generator(
    shape: tuple[int, int, int], config: GeneratorConfig, classes: int = 0
) -> Generator:
    """Build G with random weights for images of this height, width and channels."""
    layout = ResolutionLayout(shape[0], shape[2], config.depth, config.width)
    family = FAMILIES[config.family]
    encoder = nn.Sequential(family.trunk(layout), nn.Linear(layout.flat, config.latent))
    class_embedding = nn.Embedding(classes, config.latent) if classes else None
    decoder = family.decoder(config.latent, layout)
    network = Generator(encoder, decoder, config.latent_noise_std, class_embedding)
    return network.apply(initialize)


def build_discriminator(
    shape: tuple[int, int, int],
    config: DiscriminatorConfig,
    classes: int = 0,
    is_projection: bool = False,
    contrad: bool = False,
) -> Discriminator:
    """Build D with random weights for images of this height, width and channels."""
    layout = ResolutionLayout(shape[0], shape[2], config.depth, config.width)
    trunk = FAMILIES[config.family].trunk(layout)
    sizes = layout.deepest, config.hidden, config.embedding
    network = Discriminator(trunk, *sizes, classes, is_projection, contrad).apply(initialize)
    if config.spectral_norm:  # of every layer that a score depends on
        heads = [*network.score_hidden.modules(), network.score]
        heads += [network.class_head] if network.is_projection and network.class_head else []
        for module in (*network.trunk.modules(), *heads):
            if isinstance(module, nn.Conv2d | nn.Linear):
                parametrizations.spectral_norm(module)
    return network


def initialize(module: nn.Module) -> None:
    """Initialize a layer for leaky ReLU (He et al., 2015, equation 15), with zero biases.

    Modules that initialize their own weights are left alone.
    """
    if isinstance(module, ZeroConv):
        nn.init.zeros_(module.weight)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        transposed = isinstance(module, nn.ConvTranspose2d)
        nn.init.kaiming_normal_(module.weight, a=0.2, mode="fan_out" if transposed else "fan_in")
        if isinstance(module, FixupConv):
            with torch.no_grad():
                module.weight.mul_(module.gain)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
