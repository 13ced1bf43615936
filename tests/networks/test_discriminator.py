"""The representation has a bounded size, and is that of earlier versions where maps are small."""

from itertools import product

import pytest
import torch
from torch.nn.functional import normalize

from cl_ray.config import preset
from cl_ray.networks.build import FAMILIES, build_discriminator
from cl_ray.networks.config import DiscriminatorConfig


@pytest.mark.parametrize("family", FAMILIES)
def test_the_representation_is_bounded_at_any_size_and_depth(family: str) -> None:
    with torch.device("meta"):
        for side, depth, width in product((28, 48, 100, 256), (1, 3, 6), (4, 32)):
            config = DiscriminatorConfig.model_validate(
                {"family": family, "depth": depth, "width": width}
            )
            network = build_discriminator((side, side, 3), config)
            dimensions = network.representation(torch.zeros(2, 3, side, side)).shape
            assert dimensions == (2, network.representation_dim)
            assert network.representation_dim <= 1152 + 256 + 64 <= 2048


@pytest.mark.parametrize(
    ("name", "side", "dimensions"),
    [
        ("quick", 28, 1472),
        ("mnist", 28, 1152 + 1024 + 64),
        ("photos-64", 64, 1344),
        ("photos-128", 128, 1344),
        ("photos-256", 256, 1344),
        ("quick", 64, 1472),
    ],
)
def test_dimensions_of_the_presets(name: str, side: int, dimensions: int) -> None:
    with torch.device("meta"):
        network = build_discriminator((side, side, 1), preset(name).discriminator)
    assert network.representation_dim == dimensions
    assert not any("pool" in key for key in network.state_dict())  # checkpoints stay as they are


@pytest.mark.parametrize(("side", "window"), [(28, 1), (64, 3), (90, 4)])
def test_large_maps_are_averaged_and_small_ones_kept(side: int, window: int) -> None:
    config = DiscriminatorConfig(width=32, hidden=8, embedding=4)
    network = build_discriminator((side, side, 1), config).double()
    images = torch.rand(2, 1, side, side, dtype=torch.float64)
    maps = network.features(images).unflatten(1, (128, side // 8, side // 8))
    starts = range(0, side // 8, window)
    averaged = [
        maps[:, :, row : row + window, column : column + window].mean((2, 3))
        for row, column in product(starts, starts)
    ]
    features = torch.stack(averaged, 2).flatten(1)
    assert features.shape[1] == network.representation_dim - 8 - 4
    given = network.representation(images)[:, : features.shape[1]]
    assert torch.allclose(given, normalize(features, dim=1), rtol=0, atol=1e-12)
    assert window > 1 or torch.equal(features, network.features(images))
