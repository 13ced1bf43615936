"""Penalties against finite differences; their values in a step are in test_gan.py."""

import pytest
import torch
from torch import Tensor

from cl_ray.losses import penalties
from cl_ray.losses.penalties import approximate_r1, rademacher, sample_rademacher

SHAPE = (2, 5, 7)


def test_rademacher_signs_are_fair_independent_and_seeded() -> None:
    drawn = sample_rademacher(4000, SHAPE, torch.Generator().manual_seed(1))
    n = rademacher(drawn, SHAPE).double()
    assert n.shape == (4000, *SHAPE)
    assert set(n.unique().tolist()) == {-1.0, 1.0}
    flat = n.flatten(1)
    products = flat.T @ flat / len(flat)  # their covariance: the identity, to 1 / sqrt(4000)
    assert torch.allclose(products, torch.eye(70, dtype=torch.float64), atol=0.08)
    assert flat.mean(0).abs().max() < 0.08
    again = sample_rademacher(4000, SHAPE, torch.Generator().manual_seed(1))
    assert torch.equal(drawn, again)
    assert not torch.equal(drawn, sample_rademacher(4000, SHAPE, torch.Generator().manual_seed(2)))


def test_mean_of_approximate_r1_is_r1() -> None:
    """Of a smooth score, over many directions."""
    torch.manual_seed(0)
    weight = torch.randn(70, dtype=torch.float64) / 8

    def score(x: torch.Tensor) -> torch.Tensor:
        return torch.sin(x.flatten(1) @ weight) + (x.flatten(1) @ weight).square() / 3

    x = torch.rand(1, *SHAPE, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(x).sum(), x)
    exact = gradient.square().sum() / 2
    directions = rademacher(
        sample_rademacher(40_000, SHAPE, torch.Generator().manual_seed(3)), SHAPE
    )
    step = 1e-3
    many = approximate_r1(score(x), score(x + step * directions), step)
    assert many.mean().item() == pytest.approx(exact.item(), rel=0.03)


def smooth_score(x: Tensor, weight: Tensor) -> Tensor:
    """Return a nonlinear score of images."""
    return torch.tanh((x.flatten(1) ** 3) @ weight)


@pytest.mark.parametrize("penalty", [penalties.zero_centered_penalty, penalties.gradient_penalty])
def test_exact_penalties_are_differentiable(penalty: type) -> None:
    """Their gradient with respect to the weights, against central differences."""
    random = torch.Generator().manual_seed(5)
    weight = torch.randn(70, generator=random, dtype=torch.float64).mul_(0.3).requires_grad_()
    images = torch.rand(3, *SHAPE, generator=random, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda w: penalty(penalties.input_gradient(lambda x: smooth_score(x, w), images)), (weight,)
    )


def test_interpolated_points_lie_between_fake_and_real() -> None:
    real, fake = torch.rand(2, 3, *SHAPE, dtype=torch.float64)
    points = penalties.interpolate(real, fake, torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64))
    assert torch.equal(points[0], fake[0])
    assert torch.allclose(points[1], 0.25 * real[1] + 0.75 * fake[1], rtol=0, atol=1e-15)
    assert torch.equal(points[2], real[2])
