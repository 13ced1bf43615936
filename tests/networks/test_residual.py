"""The residual family's own parts, against loops."""

import pytest
import torch

from cl_ray.networks.build import initialize
from cl_ray.networks.layout import ResolutionLayout
from cl_ray.networks.resample import enlarge, halve
from cl_ray.networks.residual import ResidualBlock, residual_decoder, residual_trunk

DOUBLE = torch.float64


@pytest.mark.parametrize("side", [6, 7, 28, 45])
def test_down_is_the_binomial_filter_at_every_second_pixel(side: int) -> None:
    x = torch.rand(2, 3, side, side, dtype=DOUBLE)
    small = halve(side)(x)
    assert small.shape == (2, 3, side // 2, side // 2)
    taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    for row in range(side // 2):
        for column in range(side // 2):
            expected = sum(
                a * b * x[1, 2, at(2 * row + i - 1, side), at(2 * column + j - 1, side)]
                for i, a in enumerate(taps)
                for j, b in enumerate(taps)
            )
            assert small[1, 2, row, column].item() == pytest.approx(expected.item(), abs=1e-12)


def at(place: int, side: int) -> int:
    """Beyond the edge the edge goes on."""
    return min(max(place, 0), side - 1)


def test_up_to_twice_the_side_is_the_same_filter() -> None:
    x = torch.rand(1, 1, 5, 5, dtype=DOUBLE)
    large = enlarge(5, 10)(x)[0, 0]
    for row in range(10):
        for column in range(10):
            rows, columns = ((n // 2, n // 2 + (1 if n % 2 else -1)) for n in (row, column))
            expected = sum(
                a * b * x[0, 0, at(i, 5), at(j, 5)]
                for i, a in zip(rows, (0.75, 0.25), strict=True)
                for j, b in zip(columns, (0.75, 0.25), strict=True)
            )
            assert large[row, column].item() == pytest.approx(expected.item(), abs=1e-12)


def test_a_block_starts_as_the_identity_and_does_not_stay_it() -> None:
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


def test_inner_weights_start_smaller_in_deeper_networks() -> None:
    """Fixup's rule for branches of three convolutions: by the fourth root of the depth."""
    spreads = {}
    for blocks in (1, 16):
        torch.manual_seed(0)
        spreads[blocks] = ResidualBlock(64, blocks).apply(initialize).expand.weight.std().item()
    assert spreads[16] == pytest.approx(spreads[1] / 2, rel=1e-6)
    assert spreads[1] == pytest.approx((2 / 1.04 / 64) ** 0.5, rel=0.05)


@pytest.mark.parametrize("depth", [1, 3, 8])
def test_there_are_as_many_blocks_as_levels(depth: int) -> None:
    plan = ResolutionLayout(28, 1, depth, 8)
    for network in (residual_trunk(plan), residual_decoder(7, plan)):
        assert sum(isinstance(layer, ResidualBlock) for layer in network) == depth
