"""Views: each transformation keeps its range, uses it, and leaves the others alone."""

from typing import Any

import pytest
import torch
from torch import Tensor

from cl_ray.data.config import ViewConfig
from cl_ray.data.views import GRID, ViewParams, apply_views, sample_views

STILL = {"rotate": 0, "shift": 0, "scale": 0, "shear": 0, "warp": 0, "erase": 0}


def drawn(count: int = 500, seed: int = 0, **config: float) -> ViewParams:
    random = torch.Generator().manual_seed(seed)
    return sample_views(ViewConfig(**{**STILL, **config}), count, random)


def images(count: int, side: int = 28, channels: int = 1, dtype: Any = torch.float64) -> Tensor:
    random = torch.Generator().manual_seed(count)
    return torch.rand(count, channels, side, side, generator=random, dtype=dtype) * 2 - 1


def double(views: ViewParams) -> ViewParams:
    return ViewParams(*(part.double() for part in views))


def parts(maps: Tensor) -> dict[str, Tensor]:
    """Angle, size, shear (degrees) and shift (fraction of the side) of [[R S | t]] of each map."""
    first, second = maps[:, :, 0], maps[:, :, 1]
    length = first.norm(dim=1)
    return {
        "rotate": torch.atan2(first[:, 1], first[:, 0]).rad2deg(),
        "scale": 1 / length,
        "shear": torch.atan((first * second).sum(1) / length.square()).rad2deg(),
        "shift": maps[:, :, 2].reshape(-1) / 2,
    }


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [28, 29, 45, 64])
def test_a_view_that_changes_nothing(side: int, channels: int) -> None:
    given = images(4, side, channels)
    assert torch.allclose(apply_views(given, double(drawn(4))), given, rtol=0, atol=1e-12)
    single = given.float()
    assert torch.allclose(apply_views(single, drawn(4)), single, rtol=0, atol=1e-4)


def test_draws_follow_from_their_generator() -> None:
    config: dict[str, Any] = {"rotate": 20, "shift": 0.1, "scale": 0.2, "shear": 10}
    config |= {"warp": 0.1, "erase": 0.2}
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = drawn(20, **config)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, drawn(20, **config)))
    assert not any(map(torch.equal, first, drawn(20, seed=1, **config)))


def test_a_part_stays_what_it_is_when_another_is_changed() -> None:
    both, one = drawn(rotate=30, shift=0.2, erase=0.3), drawn(shift=0.2, warp=0.1, erase=0.3)
    assert torch.equal(both.affine[:, :, 2], one.affine[:, :, 2])
    assert torch.equal(both.keep, one.keep)
    assert not torch.equal(both.affine, one.affine)


@pytest.mark.parametrize(
    ("name", "value", "least", "most", "rest"),
    [
        ("rotate", 20, -20, 20, 0),
        ("rotate", 179, -179, 179, 0),
        ("shift", 0.12, -0.12, 0.12, 0),
        ("scale", 0.2, 0.8, 1.25, 1),
        ("scale", 0.5, 0.5, 2, 1),
        ("shear", 15, -15, 15, 0),
        ("shear", 60, -60, 60, 0),
    ],
)
def test_one_part_alone_keeps_its_range_and_uses_it(
    name: str, value: float, least: float, most: float, rest: float
) -> None:
    found = parts(drawn(2000, 0, **{name: value}).affine)
    margin = 0.02 * (most - least)
    assert least - 1e-4 <= found[name].min() <= least + margin
    assert most - margin <= found[name].max() <= most + 1e-4
    assert (found[name] < rest).double().mean().item() == pytest.approx(0.5, abs=0.06)
    unmoved = {"rotate": 0.0, "shift": 0.0, "scale": 1.0, "shear": 0.0}
    for other in unmoved.keys() - {name}:
        assert (found[other] - unmoved[other]).abs().max() < 1e-4


def test_all_parts_together_keep_their_ranges() -> None:
    limits: dict[str, Any] = {"rotate": 20, "shift": 0.12, "shear": 15}
    found = parts(drawn(2000, scale=0.2, warp=0.3, erase=0.5, **limits).affine)
    for name, limit in limits.items():
        assert found[name].abs().max() <= limit + 1e-4
    assert found["scale"].min() >= 0.8 - 1e-4
    assert found["scale"].max() <= 1.25 + 1e-4
    views = drawn(100, rotate=20, shift=0.1, scale=0.2, shear=15, warp=0.2, erase=0.2)
    assert apply_views(images(100, dtype=torch.float32), views).abs().max() <= 1 + 1e-5
    # Beyond the border lies the border: a white image stays white.
    white = torch.ones(50, 1, 28, 28)
    views = drawn(50, rotate=90, shift=0.5, scale=0.5, shear=45, warp=0.3)
    assert torch.allclose(apply_views(white, views), white, rtol=0, atol=1e-5)


def test_images_are_never_mirrored() -> None:
    maps = drawn(2000, rotate=180, shear=79, scale=0.9).affine
    assert (torch.linalg.det(maps[:, :, :2]) > 0).all()


def test_pixels_are_shifted_and_turned_exactly() -> None:
    given = torch.full((1, 1, 28, 28), -1.0, dtype=torch.float64)
    given[0, 0, 10, 12] = 1
    still = double(drawn(1))
    maps = still.affine.clone()
    maps[0, :, 2] = 2 * torch.tensor([3 / 28, -2 / 28])  # x, y
    seen = apply_views(given, still._replace(affine=maps))
    assert torch.allclose(seen[0, 0, 12, 9], torch.tensor(1.0, dtype=torch.float64), atol=1e-9)
    assert (seen > 0).sum() == 1
    given = images(1)
    quarter = torch.tensor([[[0.0, -1.0, 0.0], [1.0, 0.0, 0.0]]], dtype=torch.float64)
    seen = apply_views(given, still._replace(affine=quarter))
    assert torch.allclose(seen, given.rot90(dims=(2, 3)), rtol=0, atol=1e-9)


def test_warps_are_as_far_as_asked_and_bend_the_image() -> None:
    warps = drawn(2000, warp=0.1).displacement
    assert warps.shape == (2000, 2, GRID, GRID)
    assert warps.std().item() == pytest.approx(0.1, rel=0.02)
    assert warps.mean().item() == pytest.approx(0, abs=0.002)
    given = images(8)
    apart = (apply_views(given, double(drawn(8, warp=0.1))) - given).abs().mean()
    little = (apply_views(given, double(drawn(8, warp=0.001))) - given).abs().mean()
    assert apart > 0.1
    assert little < 0.05


@pytest.mark.parametrize("erase", [0.0, 0.15, 0.5, 0.95])
def test_the_configured_fraction_is_erased(erase: float) -> None:
    views = drawn(1000, erase=erase)
    cells = views.keep.numel()
    spread = (erase * (1 - erase) / cells) ** 0.5
    assert (views.keep == 0).double().mean().item() == pytest.approx(erase, abs=4 * spread)
    white = torch.ones(1000, 3, 28, 28)
    seen = apply_views(white, views)
    assert ((seen + 1).abs() < 1e-4).logical_or((seen - 1).abs() < 1e-4).all()
    assert (seen < 0).double().mean().item() == pytest.approx(erase, abs=4 * spread)
    assert torch.equal(seen[:, 0], seen[:, 2])  # a cell is erased in all colours


def test_erased_cells_are_blank_and_the_others_stay() -> None:
    given = images(1)
    still = double(drawn(1))
    kept = still.keep.clone()
    kept[0, 0, 1, 2] = 0
    seen = apply_views(given, still._replace(keep=kept))
    assert (seen[0, 0, 7:14, 14:21] == -1).all()
    seen[0, 0, 7:14, 14:21] = given[0, 0, 7:14, 14:21]
    assert torch.allclose(seen, given, rtol=0, atol=1e-12)
