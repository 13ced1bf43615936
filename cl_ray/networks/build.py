"""The families of networks: what G and D of a config are built of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import parametrizations

from cl_ray.networks import convolutional, residual, style
from cl_ray.networks.config import DiscriminatorConfig, GeneratorConfig
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator
from cl_ray.networks.layout import ResolutionLayout
from cl_ray.train_config import GANConfig


@dataclass(frozen=True)
class NetworkFamily:
    """A kind of network.

    Args:
        trunk: Builds what takes images [B, C, S, S] to flat maps [B, plan.flat], for D and for
            G's encoder.
        decoder: Builds what takes vectors [B, inputs] to images [B, C, S, S] in [-1, 1].
    """

    trunk: Callable[[ResolutionLayout], nn.Module]
    decoder: Callable[[int, ResolutionLayout], nn.Module]


FAMILIES = {
    "convolutional": NetworkFamily(
        convolutional.convolutional_trunk_layer, convolutional.convolutional_decoder
    ),
    "residual": NetworkFamily(residual.residual_trunk, residual.residual_decoder),
    "style": NetworkFamily(residual.residual_trunk, style.StyleDecoder),
}


def build_networks(
    config: GANConfig, shape: tuple[int, int, int], classes: int = 0
) -> tuple[Generator, Discriminator]:
    """G and D of a config for images of that height, width and channels, their weights drawn.

    Args:
        config: The config tree.
        shape: Height, width and channels.
        classes: How many there are; 0 unless `config.condition` uses labels.
    """
    projects, contrad = config.condition == "projection", config.losses.form == "contrad"
    return (
        build_generator(shape, config.generator, classes),
        build_discriminator(shape, config.discriminator, classes, projects, contrad),
    )


def build_generator(
    shape: tuple[int, int, int], config: GeneratorConfig, classes: int = 0
) -> Generator:
    """G for images of that height, width and channels, of so many classes, its weights drawn."""
    plan = ResolutionLayout(shape[0], shape[2], config.depth, config.width)
    family = FAMILIES[config.family]
    encoder = nn.Sequential(family.trunk(plan), nn.Linear(plan.flat, config.latent))
    table = nn.Embedding(classes, config.latent) if classes else None
    network = Generator(
        encoder, family.decoder(config.latent, plan), config.latent_noise_std, table
    )
    return network.apply(initialize)


def build_discriminator(
    shape: tuple[int, int, int],
    config: DiscriminatorConfig,
    classes: int = 0,
    projects: bool = False,
    contrad: bool = False,
) -> Discriminator:
    """D for images of that height, width and channels, of so many classes, its weights drawn."""
    plan = ResolutionLayout(shape[0], shape[2], config.depth, config.width)
    trunk = FAMILIES[config.family].trunk(plan)
    sizes = plan.flat, config.hidden, config.embedding
    network = Discriminator(trunk, *sizes, classes, projects, contrad).apply(initialize)
    if config.spectral_norm:
        heads = [*network.judge.modules(), network.score]
        heads += [network.classes] if network.projects and network.classes else []
        for module in (*network.trunk.modules(), *heads):
            if isinstance(module, nn.Conv2d | nn.Linear):
                parametrizations.spectral_norm(module)
    return network


def initialize(module: nn.Module) -> None:
    """He initialisation for leaky rectifiers (He et al., 2015, equation 15), biases zero.

    Modules with starting weights of their own are left to them.
    """
    if isinstance(module, residual.ZeroConv):
        nn.init.zeros_(module.weight)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
        transposed = isinstance(module, nn.ConvTranspose2d)
        nn.init.kaiming_normal_(module.weight, a=0.2, mode="fan_out" if transposed else "fan_in")
        if isinstance(module, residual.FixupConv):
            with torch.no_grad():
                module.weight.mul_(module.gain)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
