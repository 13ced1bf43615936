"""Parts of the style-based family."""

import math
from typing import cast

import pytest
import torch
from torch.nn import functional

from cl_ray.networks.build import build_generator
from cl_ray.networks.config import GeneratorConfig
from cl_ray.networks.generator import Generator
from cl_ray.networks.style import (
    MAPPING_LR_SCALE,
    MIXING_PROBABILITY,
    STYLE_DIM,
    EqualizedLinear,
    ModulatedConv,
    StyleDecoder,
    StyleLayer,
)

DOUBLE = torch.float64


def generator() -> tuple[Generator, StyleDecoder]:
    torch.manual_seed(0)
    config = GeneratorConfig(family="style", depth=3, width=4, latent=7)
    network = build_generator((28, 28, 1), config).double()
    assert isinstance(network.decoder, StyleDecoder)
    return network, network.decoder


def style_layers(decoder: StyleDecoder) -> list[StyleLayer]:
    return cast(list[StyleLayer], list(decoder.layers))


def enable_noise(decoder: StyleDecoder) -> None:
    """Give every layer's noise an effect, which it has not at first."""
    with torch.no_grad():
        for layer in style_layers(decoder):
            layer.strength.fill_(0.5)


def test_layers_keep_bfloat16_under_autocast() -> None:
    layer = StyleLayer((5, 6), 8)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(torch.randn(2, 5, 8, 8), torch.randn(2, STYLE_DIM), None)
    assert output.dtype == torch.bfloat16


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_modulation_equals_separate_weights_for_each_sample(size: int, demodulate: bool) -> None:
    """StyleGAN2, equations 1 and 3, sample by sample."""
    torch.manual_seed(0)
    layer = ModulatedConv((5, 6), size, demodulate).double()
    x, w = torch.randn(3, 5, 9, 9, dtype=DOUBLE), torch.randn(3, STYLE_DIM, dtype=DOUBLE)
    ours = layer(x, w)
    for i in range(3):
        weight = layer.weight * layer.scale * layer.style(w)[i][None, :, None, None]
        if demodulate:
            weight = weight / torch.sqrt((weight**2).sum((1, 2, 3), keepdim=True) + 1e-8)
        expected = functional.conv2d(x[i : i + 1], weight, padding=size // 2)[0]
        assert torch.allclose(ours[i], expected, rtol=0, atol=1e-12)


def test_without_noise_an_image_depends_on_its_latent_vector_only() -> None:
    network, decoder = generator()
    enable_noise(decoder)
    z = torch.randn(4, 7, dtype=DOUBLE)
    images = network.decode(z)
    assert torch.allclose(network.decode(z[2:]), images[2:], rtol=0, atol=1e-12)
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_noise_of_each_layer_has_an_effect() -> None:
    network, decoder = generator()
    z, noise = (
        torch.randn(1, 7, dtype=DOUBLE),
        torch.randn(1, decoder.noise_dim, dtype=DOUBLE),
    )
    noise[:, -1] = math.inf
    assert torch.allclose(network.decode(z, noise), network.decode(z), rtol=0, atol=1e-12)
    enable_noise(decoder)
    begin = 0
    for end in decoder.noise_ends:
        other = noise.clone()
        other[:, begin:end] = torch.randn(1, end - begin, dtype=DOUBLE)
        assert not torch.allclose(network.decode(z, other), network.decode(z, noise), atol=1e-4)
        begin = end
    assert begin == decoder.noise_dim - 7 - 2


def test_only_fakes_of_noise_mix_styles() -> None:
    network, decoder = generator()
    random = torch.Generator().manual_seed(1)
    given = torch.rand(40, 1, 28, 28, generator=random, dtype=DOUBLE)
    z, latent_noise = torch.randn(2, 40, 7, generator=random, dtype=DOUBLE)
    noise = torch.randn(80, decoder.noise_dim, generator=random, dtype=DOUBLE)
    plain, mixed = (
        network(given, z, latent_noise)[0],
        network(given, z, latent_noise, noise)[0],
    )
    same = (plain - mixed).abs().flatten(1).max(1).values < 1e-12
    assert same[:40].all()
    assert same[40:].sum() <= 40 * (1 - MIXING_PROBABILITY) + 8
    # The earlier the second style replaces the first, the closer is the image to its own.
    first, second = z[:1], z[1:2]
    chosen = torch.zeros(1, decoder.noise_dim, dtype=DOUBLE)
    chosen[:, decoder.noise_ends[-1] : -2] = second
    chosen[:, -2:] = torch.tensor([-10.0, 0.0])  # from the earliest layer; mixed
    early = network.decode(first, chosen)
    chosen[:, -2] = 10.0
    late = network.decode(first, chosen)
    distance = [(image - network.decode(second)).abs().mean().item() for image in (early, late)]
    assert distance[0] < distance[1]


def test_mapping_network_learns_a_hundred_times_slower() -> None:
    """A step of Adam changes all weights alike; the layer scales its effect."""
    torch.manual_seed(0)
    x = torch.randn(64, 7, dtype=DOUBLE)
    changes = []
    for lr_scale in (1.0, MAPPING_LR_SCALE):
        torch.manual_seed(1)
        layer = EqualizedLinear(7, 5, lr_scale=lr_scale).double()
        before = layer(x)
        adam = torch.optim.Adam(layer.parameters(), lr=0.001)
        before.square().sum().backward()
        adam.step()
        changes.append((layer(x) - before).abs().mean().item())
        assert before.std().item() == pytest.approx(1, abs=0.3)
    assert changes[1] == pytest.approx(changes[0] / 100, rel=1e-3)
    _, decoder = generator()
    assert all(layer.lr_scale == MAPPING_LR_SCALE for layer in decoder.mapping)
    assert all(layer.convolution.style.lr_scale == 1 for layer in style_layers(decoder))
