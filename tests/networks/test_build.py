"""Every network family at every size, depth and number of channels."""

from itertools import cycle, product
from typing import get_args

import pytest
import torch
from torch import Tensor, nn

from cl_ray.networks.build import FAMILIES, build_discriminator, build_generator
from cl_ray.networks.config import DiscriminatorConfig, Family, GeneratorConfig
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator

SIDES = [16, 28, 31, 45, 64]
WIDTHS = cycle([4, 5, 8, 13])
CHANNELS = cycle([1, 3])
SIZES = [
    (family, side, next(CHANNELS), depth, next(WIDTHS))
    for family, side, depth in product(FAMILIES, SIDES, (1, 3, 6))
]
LATENT, HIDDEN, EMBEDDING = 7, 9, 6
DOUBLE = torch.float64


def images(count: int, side: int, channels: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.rand(count, channels, side, side, generator=random, dtype=DOUBLE) * 2 - 1


def noise(count: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, LATENT, generator=random, dtype=DOUBLE)


def generator(family: str, side: int, channels: int, depth: int, width: int) -> Generator:
    torch.manual_seed(0)
    fields = {"family": family, "depth": depth, "width": width}
    config = GeneratorConfig.model_validate({**fields, "latent": LATENT, "latent_noise_std": 0.3})
    return build_generator((side, side, channels), config).double()


def discriminator(family: str, side: int, channels: int, depth: int, width: int) -> Discriminator:
    torch.manual_seed(0)
    config = DiscriminatorConfig.model_validate(
        {"family": family, "depth": depth, "width": width, "hidden": HIDDEN, "embedding": EMBEDDING}
    )
    return build_discriminator((side, side, channels), config).double()


def perturb(network: nn.Module) -> None:
    """Change every weight: some are zero at first."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, dtype=DOUBLE))


def assert_gradients(network: nn.Module, result: Tensor) -> None:
    """Check that every weight has a finite gradient that is not all zero."""
    random = torch.Generator().manual_seed(1)
    (result * torch.randn(result.shape, generator=random, dtype=DOUBLE)).sum().backward()
    for name, weight in network.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.isfinite().all(), name
        assert weight.grad.any(), name


def test_every_family_can_be_configured() -> None:
    given = set(get_args(Family))
    assert given == set(FAMILIES), "give Family of cl_ray/networks/config.py the names of FAMILIES"


@pytest.mark.parametrize(("family", "side", "channels", "depth", "width"), SIZES)
def test_generator(family: str, side: int, channels: int, depth: int, width: int) -> None:
    network = generator(family, side, channels, depth, width)
    perturb(network)
    given, z, latent_noise = images(2, side, channels), noise(3), noise(2, seed=2)
    fakes, latents = network(given, z, latent_noise)
    assert torch.equal(latents, network.encode(given))
    assert fakes.shape == (5, channels, side, side)
    assert fakes.abs().max() <= 1
    assert network.encode(given).shape == (2, LATENT)
    perturbed = network.encode(given) + 0.3 * latent_noise
    decoded = torch.cat([network.decode(perturbed), network.decode(z)])
    assert torch.allclose(fakes, decoded, rtol=0, atol=1e-12)
    assert_gradients(network, fakes)


@pytest.mark.parametrize(("family", "side", "channels", "depth", "width"), SIZES)
def test_discriminator(family: str, side: int, channels: int, depth: int, width: int) -> None:
    network = discriminator(family, side, channels, depth, width)
    perturb(network)
    given = images(3, side, channels)
    scores, embeddings = network(given)[:2]
    assert scores.shape == (3,)
    assert embeddings.shape == (3, EMBEDDING)
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(3, dtype=DOUBLE), rtol=0, atol=1e-12)
    assert network.features(given).ndim == 2
    assert_gradients(network, torch.cat([scores[:, None], embeddings], 1))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", range(16, 65))
def test_generator_keeps_every_side(side: int, family: str) -> None:
    network = generator(family, side, 1, 6, 4)
    assert network(images(1, side, 1), noise(1), noise(1))[0].shape == (2, 1, side, side)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("side", "depth"), [(16, 6), (28, 3), (45, 1)])
def test_samples_of_a_batch_are_independent(side: int, depth: int, family: str) -> None:
    """In training mode, by gradients and by values."""
    g, d = generator(family, side, 1, depth, 4), discriminator(family, side, 1, depth, 4)
    given, z = images(3, side, 1).requires_grad_(), noise(2).requires_grad_()
    (fakes, _), (scores, embeddings) = g(given, z, noise(3, seed=2)), d(given)[:2]
    for i in range(3):
        for result in (fakes[i], scores[i], embeddings[i]):
            (gradient,) = torch.autograd.grad(result.sin().sum(), given, retain_graph=True)
            assert gradient[i].any()
            assert not gradient[torch.arange(3) != i].any()
    for i in range(2):
        gradients = torch.autograd.grad(fakes[3 + i].sin().sum(), (given, z), retain_graph=True)
        assert not gradients[0].any()
        assert gradients[1][i].any()
        assert not gradients[1][1 - i].any()
    # The same sample in another batch.
    others = images(3, side, 1, seed=1)
    others[1] = given[1].detach()
    assert torch.allclose(
        g(others, noise(2, seed=1), noise(3, seed=2))[0][1], fakes[1], rtol=0, atol=1e-12
    )
    assert torch.allclose(d(others)[0][1], scores[1], rtol=0, atol=1e-12)
    assert torch.allclose(d(others)[1][1], embeddings[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_latents_lie_on_the_sphere(family: str) -> None:
    network = generator(family, 28, 1, 2, 4)
    encoded = network.encode(images(5, 28, 1))
    assert torch.allclose(encoded.square().mean(1), torch.ones(5, dtype=DOUBLE), atol=1e-3)
    assert torch.allclose(network.decode(noise(5) * 3), network.decode(noise(5)), atol=1e-4)


def test_spectral_norm_of_every_weight_of_the_score_is_1() -> None:
    torch.manual_seed(0)
    config = DiscriminatorConfig(depth=3, width=4, spectral_norm=True)
    network = build_discriminator((28, 28, 1), config)
    for _ in range(50):
        network(torch.rand(2, 1, 28, 28))
    norms = {
        name: torch.linalg.matrix_norm(module.weight.flatten(1), 2).item()
        for name, module in network.named_modules()
        if name.startswith(("trunk", "score")) and isinstance(module, nn.Conv2d | nn.Linear)
    }
    assert len(norms) == 4
    assert norms == pytest.approx(dict.fromkeys(norms, 1.0), rel=1e-3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    network.eval()(torch.rand(2, 1, 28, 28))  # evaluation does not update it
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
