"""The penalties against their definitions."""

import pytest
import torch

from cl_ray.losses.penalties import approximate_r1, draw_signs, signs

SHAPE = (2, 5, 7)


def test_signs_are_fair_independent_and_follow_from_the_generator() -> None:
    drawn = draw_signs(4000, SHAPE, torch.Generator().manual_seed(1))
    n = signs(drawn, SHAPE).double()
    assert n.shape == (4000, *SHAPE)
    assert set(n.unique().tolist()) == {-1.0, 1.0}
    flat = n.flatten(1)
    products = flat.T @ flat / len(flat)  # their covariance: the identity, to 1 / sqrt(4000)
    assert torch.allclose(products, torch.eye(70, dtype=torch.float64), atol=0.08)
    assert flat.mean(0).abs().max() < 0.08
    again = draw_signs(4000, SHAPE, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, draw_signs(4000, SHAPE, torch.Generator().manual_seed(2)))


@pytest.mark.parametrize("spread", [1e-4, 0.1])
def test_it_is_the_finite_difference(spread: float) -> None:
    first, second = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([1.5, -2.0, 0.0])
    expected = [
        (b - a) ** 2 / spread**2 / 2 for a, b in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert approximate_r1(first, second, spread).tolist() == pytest.approx(expected, rel=1e-6)


def test_its_mean_is_r1() -> None:
    """Of a smooth score, over many directions: half the squared norm of the exact gradient."""
    torch.manual_seed(0)
    weight = torch.randn(70, dtype=torch.float64) / 8

    def score(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x.flatten(1) @ weight) + (x.flatten(1) @ weight).square() / 3

    x = torch.rand(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(score(x).sum(), x)
    exact = slope.square().sum() / 2
    directions = signs(draw_signs(40_000, SHAPE, torch.Generator().manual_seed(3)), SHAPE)
    spread = 1e-3
    many = approximate_r1(score(x), score(x + spread * directions), spread)
    assert many.mean().item() == pytest.approx(exact.item(), rel=0.03)
