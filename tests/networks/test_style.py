"""The style-based family's own parts."""

import math

import pytest
import torch
from torch.nn import functional

from cl_ray.networks.build import build_generator
from cl_ray.networks.config import GeneratorConfig
from cl_ray.networks.generator import Generator
from cl_ray.networks.style import (
    MAPPING_RATE,
    MIXING,
    STYLE,
    EqualizedLinear,
    ModulatedConv,
    StyleDecoder,
)

DOUBLE = torch.float64


def generator() -> tuple[Generator, StyleDecoder]:
    torch.manual_seed(0)
    config = GeneratorConfig(family="style", depth=3, width=4, latent=7)
    network = build_generator((28, 28, 1), config).double()
    assert isinstance(network.decoder, StyleDecoder)
    return network, network.decoder


def noisy(decoder: StyleDecoder) -> None:
    """Let every layer's noise count, which it does not at first."""
    with torch.no_grad():
        for layer in decoder.layers:
            layer.strength.fill_(0.5)


@pytest.mark.parametrize("demodulate", [True, False])
@pytest.mark.parametrize("size", [1, 3])
def test_modulation_is_a_weight_made_for_each_sample(size: int, demodulate: bool) -> None:
    """StyleGAN2, equations 1 and 3, sample by sample."""
    torch.manual_seed(0)
    layer = ModulatedConv((5, 6), size, demodulate).double()
    x, w = torch.randn(3, 5, 9, 9, dtype=DOUBLE), torch.randn(3, STYLE, dtype=DOUBLE)
    ours = layer(x, w)
    for i in range(3):
        weight = layer.weight * layer.scale * layer.style(w)[i][None, :, None, None]
        if demodulate:
            weight = weight / torch.sqrt((weight**2).sum((1, 2, 3), keepdim=True) + 1e-8)
        expected = functional.conv2d(x[i : i + 1], weight, padding=size // 2)[0]
        assert torch.allclose(ours[i], expected, rtol=0, atol=1e-12)


def test_without_extras_an_image_is_a_function_of_its_latent_vector() -> None:
    network, decoder = generator()
    noisy(decoder)
    z = torch.randn(4, 7, dtype=DOUBLE)
    images = network.decode(z)
    assert torch.allclose(network.decode(z[2:]), images[2:], rtol=0, atol=1e-12)
    assert not torch.allclose(images[0], images[1], atol=1e-3)


def test_each_layer_s_noise_counts_once_its_strength_does() -> None:
    network, decoder = generator()
    z, extras = torch.randn(1, 7, dtype=DOUBLE), torch.randn(1, decoder.extras, dtype=DOUBLE)
    extras[:, -1] = math.inf
    assert torch.allclose(network.decode(z, extras), network.decode(z), rtol=0, atol=1e-12)
    noisy(decoder)
    begin = 0
    for end in decoder.ends:
        other = extras.clone()
        other[:, begin:end] = torch.randn(1, end - begin, dtype=DOUBLE)
        assert not torch.allclose(network.decode(z, other), network.decode(z, extras), atol=1e-4)
        begin = end
    assert begin == decoder.extras - 7 - 2


def test_styles_mix_in_fakes_of_noise_alone() -> None:
    network, decoder = generator()
    random = torch.Generator().manual_seed(1)
    given = torch.rand(40, 1, 28, 28, generator=random, dtype=DOUBLE)
    z, moves = torch.randn(2, 40, 7, generator=random, dtype=DOUBLE)
    extras = torch.randn(80, decoder.extras, generator=random, dtype=DOUBLE)
    plain, mixed = network(given, z, moves)[0], network(given, z, moves, extras)[0]
    same = (plain - mixed).abs().flatten(1).max(1).values < 1e-12
    assert same[:40].all()
    assert same[40:].sum() <= 40 * (1 - MIXING) + 8
    # The second style alone paints what the first does not: from the first layer that takes it.
    first, second = z[:1], z[1:2]
    chosen = torch.zeros(1, decoder.extras, dtype=DOUBLE)
    chosen[:, decoder.ends[-1] : -2] = second
    chosen[:, -2:] = torch.tensor([-10.0, 0.0])  # as early as can be; mixed
    early = network.decode(first, chosen)
    chosen[:, -2] = 10.0
    late = network.decode(first, chosen)
    distance = [(image - network.decode(second)).abs().mean().item() for image in (early, late)]
    assert distance[0] < distance[1]


def test_the_mapping_learns_a_hundred_times_as_slowly() -> None:
    """One step of Adam moves every weight as far: its effect is what the layer's rate scales."""
    torch.manual_seed(0)
    x = torch.randn(64, 7, dtype=DOUBLE)
    changes = []
    for rate in (1.0, MAPPING_RATE):
        torch.manual_seed(1)
        layer = EqualizedLinear(7, 5, rate=rate).double()
        before = layer(x)
        adam = torch.optim.Adam(layer.parameters(), lr=0.001)
        before.square().sum().backward()
        adam.step()
        changes.append((layer(x) - before).abs().mean().item())
        assert before.std().item() == pytest.approx(1, abs=0.3)
    assert changes[1] == pytest.approx(changes[0] / 100, rel=1e-3)
    _, decoder = generator()
    assert all(layer.rate == MAPPING_RATE for layer in decoder.mapping)
    assert all(layer.convolution.style.rate == 1 for layer in decoder.layers)


def test_truncation_pulls_styles_to_the_mean_of_noise_s() -> None:
    network, _ = generator()
    z = torch.randn(5, 7, dtype=DOUBLE)
    free = network.decode(z)
    alike = network.decode(z, truncation=0.0)
    assert torch.allclose(alike, alike[:1].expand_as(alike), rtol=0, atol=1e-12)
    spread = [free.std(0).mean()]
    for truncation in (0.7, 0.3):
        spread.append(network.decode(z, truncation=truncation).std(0).mean())
    assert spread[0] > spread[1] > spread[2] > 0
