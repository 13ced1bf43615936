"""Views: each transformation keeps its range, uses it, and leaves the others alone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from cl_ray.data.config import PHOTO_VIEWS, ViewConfig
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
@pytest.mark.parametrize("side", [16, 28, 29, 45, 64])
def test_a_view_that_changes_nothing(side: int, channels: int) -> None:
    given = images(4, side, channels)
    assert torch.allclose(apply_views(given, double(drawn(4))), given, rtol=0, atol=1e-12)
    single = given.float()
    assert torch.allclose(apply_views(single, drawn(4)), single, rtol=0, atol=1e-4)


def test_draws_follow_from_their_generator() -> None:
    config: dict[str, Any] = {"rotate": 20, "shift": 0.1, "scale": 0.2, "shear": 10}
    config |= {"warp": 0.1, "erase": 0.2, "crop": 0.5, "hue": 0.2, "blur": 0.1}
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
    photo = drawn(rotate=30, shift=0.2, erase=0.3, hue=0.1, blur=0.1)  # draws after the others
    for part in ("affine", "displacement", "keep"):
        assert torch.equal(getattr(photo, part), getattr(both, part))
    assert torch.equal(photo.blur, drawn(flip=0.5, crop=0.8, contrast=0.4, blur=0.1).blur)


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


def boxes(count: int, **config: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Width, height, and left and upper edge of crops, as fractions of the side."""
    maps = drawn(count, 0, **config).affine
    assert (maps[:, 0, 1] == 0).all()
    assert (maps[:, 1, 0] == 0).all()
    width, height = maps[:, 0, 0], maps[:, 1, 1]
    left, top = (maps[:, :, 2] + 1 - torch.stack([width.abs(), height], 1)).unbind(1)
    return width, height, left / 2, top / 2


@pytest.mark.parametrize("crop", [0.05, 0.8])
def test_crops_lie_in_the_image_and_use_their_range(crop: float) -> None:
    width, height, left, top = boxes(4000, crop=crop)
    area, aspect = width * height, (width / height).log()
    assert 1 - crop - 1e-5 <= area.min() <= 1 - 0.98 * crop
    assert area.max() > 1 - 0.02 * crop
    assert area.mean().item() == pytest.approx(1 - crop / 2, abs=0.02 * crop)
    assert aspect.abs().max() <= math.log(4 / 3) + 1e-5
    assert aspect.mean().item() == pytest.approx(0, abs=0.01)
    for low, length in ((left, width), (top, height)):
        assert low.min() >= -1e-5
        assert (low + length).max() <= 1 + 1e-5
        room = (1 - length) > 0.01
        assert (low / (1 - length))[room].mean().item() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("flip", [0.0, 0.3, 1.0])
def test_flips_are_as_frequent_as_asked(flip: float) -> None:
    width, height, *corner = boxes(4000, flip=flip)
    assert (height == 1).all()
    assert (width.abs() == 1).all()
    assert all((low.abs() < 1e-6).all() for low in corner)
    assert (width < 0).double().mean().item() == pytest.approx(flip, abs=0.03)
    assert (boxes(4000, flip=flip, crop=0.5)[0].sign() == width.sign()).all()
    views, given = double(drawn(20, flip=flip)), images(20)
    mirrored = torch.where(views.affine[:, :1, :1, None] < 0, given.flip(3), given)
    assert torch.allclose(apply_views(given, views), mirrored, rtol=0, atol=1e-9)


def drawn_changes(count: int, **config: float) -> list[list[float]]:
    """Brightness, contrast, saturation, hue and blur of each view, drawn as `sample_views` does."""
    random = torch.Generator().manual_seed(0)
    torch.rand(5, count, generator=random)
    torch.randn(count, 2, GRID, GRID, generator=random)
    torch.rand(count, 1, GRID, GRID, generator=random)
    changes = []
    limits = [config.get(name, 0) for name in ("brightness", "contrast", "saturation", "hue")]
    for numbers in torch.rand(12, count, generator=random)[5:].double().T:
        *jitters, chance, grey, blur = numbers.tolist()
        jittered = [(2 * u - 1) * m * (chance < 0.8) for u, m in zip(jitters, limits, strict=True)]
        saturation = 0.0 if grey < config.get("greyscale", 0) else 1 + jittered[2]
        blurred = 2 * blur * config.get("blur", 0) if blur < 0.5 else 0.0
        hue = 2 * math.pi * jittered[3]
        changes.append([1 + jittered[0], 1 + jittered[1], saturation, hue, blurred])
    return changes


def naive_colors(image: Tensor, changes: list[float]) -> Tensor:
    """Change the colours of an image [3, H, W] in [0, 1], one step after the other."""
    brightness, contrast, saturation, hue, _ = changes

    def grey(colors: Tensor) -> Tensor:
        return 0.299 * colors[0] + 0.587 * colors[1] + 0.114 * colors[2]

    image = image * brightness
    image = contrast * image + (1 - contrast) * grey(image).mean()
    # A turn about the grey axis, as the exponential of its generator.
    x, y, z = [hue / math.sqrt(3)] * 3
    generator = torch.tensor([[0, -z, y], [z, 0, -x], [-y, x, 0]], dtype=torch.float64)
    turned = torch.linalg.matrix_exp(generator) @ image.flatten(1)
    image = turned.view_as(image)
    return (saturation * image + (1 - saturation) * grey(image)).clamp(0, 1)


COLORS = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1, "greyscale": 0.2}


@pytest.mark.parametrize("name", [*COLORS, "all"])
def test_colors_equal_the_naive_ones(name: str) -> None:
    config = COLORS if name == "all" else {name: COLORS[name]}
    given = images(30, 9, 3)
    seen = apply_views(given, double(drawn(30, 0, **config)))
    changes = drawn_changes(30, **config)
    for image, result, change in zip(given, seen, changes, strict=True):
        expected = naive_colors((image + 1) / 2, change)
        assert torch.allclose((result + 1) / 2, expected, rtol=0, atol=1e-6)
    unchanged = sum(change[:4] == [1, 1, 1, 0] for change in changes)
    assert 0 < unchanged < 30


def test_greyscale_is_as_frequent_as_asked() -> None:
    seen = apply_views(images(2000, 8, 3), double(drawn(2000, greyscale=0.3)))
    is_grey = (seen - seen.mean(1, keepdim=True)).abs().amax((1, 2, 3)) < 1e-6
    assert is_grey.double().mean().item() == pytest.approx(0.3, abs=0.04)


def test_a_grey_image_changes_as_three_equal_channels_do() -> None:
    given = images(30)
    for config in (COLORS, PHOTO_VIEWS.model_dump()):
        views = double(drawn(30, 0, **config))
        seen, colored = apply_views(given, views), apply_views(given.repeat(1, 3, 1, 1), views)
        assert torch.allclose(colored, seen.expand_as(colored), rtol=0, atol=1e-6)
    still = apply_views(given, double(drawn(30, saturation=1, hue=0.5, greyscale=1)))
    assert torch.allclose(still, given, rtol=0, atol=1e-6)


def test_blur_equals_the_naive_one() -> None:
    side, config = 12, {"blur": 0.2}
    given = images(8, side, 3)
    views = double(drawn(8, 0, **config))
    seen = apply_views(given, views)
    stds = [change[-1] * side for change in drawn_changes(8, **config)]
    assert 0 < stds.count(0) < 8
    for image, result, std in zip(given, seen, stds, strict=True):
        for row, column in ((0, 0), (5, 11), (6, 4)):
            total, weights = torch.zeros(3, dtype=torch.float64), 0.0
            for j in range(side):
                for i in range(side):
                    distance = (i - column) ** 2 + (j - row) ** 2
                    weight = math.exp(-distance / (2 * std**2)) if std else float(not distance)
                    total, weights = total + weight * image[:, j, i], weights + weight
            assert torch.allclose(result[:, row, column], total / weights, rtol=0, atol=1e-6)


def test_photo_views_stay_in_range_and_carry_gradients() -> None:
    strong = {"flip": 0.5, "crop": 0.9, "brightness": 1, "contrast": 1, "saturation": 1, "hue": 0.5}
    given = images(200, 16, 3, torch.float32).sign()
    assert apply_views(given, drawn(200, 0, **strong, blur=0.2)).abs().max() <= 1 + 1e-5
    smooth = images(4, 6, 3) / 4  # no colour is cut
    views = double(drawn(4, **{**PHOTO_VIEWS.model_dump(), "brightness": 0.1, "blur": 0.1}))
    assert torch.autograd.gradcheck(lambda x: apply_views(x, views), smooth.requires_grad_())
