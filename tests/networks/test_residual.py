"""Parts of the residual family, against loops."""

import pytest
import torch

from cl_ray.networks.build import initialize
from cl_ray.networks.layout import ResolutionLayout
from cl_ray.networks.resample import downsample, upsample
from cl_ray.networks.residual import ResidualBlock, residual_decoder, residual_trunk

DOUBLE = torch.float64


@pytest.mark.parametrize("side", [6, 7, 28, 45])
def test_downsample_is_the_binomial_filter(side: int) -> None:
    x = torch.rand(2, 3, side, side, dtype=DOUBLE)
    small = downsample(side)(x)
    assert small.shape == (2, 3, side // 2, side // 2)
    image, taps = x[1, 2].tolist(), [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    for row in range(side // 2):
        for column in range(side // 2):
            expected = sum(
                a * b * image[clamp(2 * row + i - 1, side)][clamp(2 * column + j - 1, side)]
                for i, a in enumerate(taps)
                for j, b in enumerate(taps)
            )
            assert small[1, 2, row, column].item() == pytest.approx(expected, abs=1e-12)


def clamp(index: int, side: int) -> int:
    """Replicate the edge."""
    return min(max(index, 0), side - 1)


def test_upsample_to_twice_the_side_is_the_same_filter() -> None:
    x = torch.rand(1, 1, 5, 5, dtype=DOUBLE)
    image, large = x[0, 0].tolist(), upsample(5, 10)(x)[0, 0]
    for row in range(10):
        for column in range(10):
            rows, columns = ((n // 2, n // 2 + (1 if n % 2 else -1)) for n in (row, column))
            expected = sum(
                a * b * image[clamp(i, 5)][clamp(j, 5)]
                for i, a in zip(rows, (0.75, 0.25), strict=True)
                for j, b in zip(columns, (0.75, 0.25), strict=True)
            )
            assert large[row, column].item() == pytest.approx(expected, abs=1e-12)


def test_block_starts_as_the_identity_and_learns() -> None:
    torch.manual_seed(0)
    block = ResidualBlock(8, 3).apply(initialize)
    x = torch.randn(2, 8, 5, 5)
    assert torch.equal(block(x), x)
    assert block.mix.groups == 1  # 16 channels inside, 16 to a group
    loss = (block(x) - 1).square().sum()
    (gradient,) = torch.autograd.grad(loss, [block.project.weight])
    assert gradient.abs().min() > 0
    with torch.no_grad():
        block.project.weight -= 1e-3 * gradient
    assert (block(x) - 1).square().sum() < loss


def test_initial_weights_shrink_with_depth() -> None:
    """Fixup, for branches of three convolutions: by the fourth root of the depth."""
    stds = {}
    for blocks in (1, 16):
        torch.manual_seed(0)
        stds[blocks] = ResidualBlock(64, blocks).apply(initialize).expand.weight.std().item()
    assert stds[16] == pytest.approx(stds[1] / 2, rel=1e-6)
    assert stds[1] == pytest.approx((2 / 1.04 / 64) ** 0.5, rel=0.05)


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_there_is_one_block_per_level(depth: int) -> None:
    layout = ResolutionLayout(28, 1, depth, 8)
    for network in (residual_trunk(layout), residual_decoder(7, layout)):
        assert sum(isinstance(layer, ResidualBlock) for layer in network) == depth
