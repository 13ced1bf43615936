"""Each adversarial objective against its equation, pair by pair."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from cl_ray.losses.adversarial import OBJECTIVES, RELATIVISTIC, Scores
from cl_ray.losses.config import LossConfig

Equation = Callable[[list[float], list[float]], float]
"""A player's loss of one pair, of the scores of (x+, x-) and of the three fakes."""


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def square(values: list[float]) -> list[float]:
    return [v * v for v in values]


def goodfellow(real: list[float], fake: list[float]) -> float:
    return mean([softplus(-s) for s in real]) + mean([softplus(s) for s in fake])


D: dict[str, Equation] = {
    "non-saturating": goodfellow,
    "minimax": goodfellow,
    "hinge": lambda real, fake: (
        mean([max(0, 1 - s) for s in real]) + mean([max(0, 1 + s) for s in fake])
    ),
    "least-squares": lambda real, fake: (
        mean(square([s - 1 for s in real])) / 2 + mean(square(fake)) / 2
    ),
    "wasserstein": lambda real, fake: mean(fake) - mean(real),
    # Each fake is compared with a real image that it was not made from.
    "relativistic": lambda real, fake: mean(
        [softplus(fake[0] - real[1]), softplus(fake[1] - real[0]), softplus(fake[2] - real[0])]
    ),
    # D maximizes E[s(g(x))] - E[s(g(z))] and E[s(x)] - E[s(g(z))], with penalty E[s^2] / 2.
    "pair-critic": lambda real, fake: (
        -(mean(fake[:2]) - fake[2])
        - (mean(real) - fake[2])
        + 0.5 * (mean(square(real)) + mean(square(fake)))
    ),
}
G: dict[str, Equation] = {
    "non-saturating": lambda real, fake: mean([softplus(-s) for s in fake]),
    "pair-critic": lambda real, fake: mean(fake[:2]) - fake[2],
    "minimax": lambda real, fake: mean([-softplus(s) for s in fake]),
    "hinge": lambda real, fake: -mean(fake),
    "least-squares": lambda real, fake: mean(square([s - 1 for s in fake])) / 2,
    "wasserstein": lambda real, fake: -mean(fake),
    "relativistic": lambda real, fake: mean(
        [softplus(real[1] - fake[0]), softplus(real[0] - fake[1]), softplus(real[0] - fake[2])]
    ),
}


def for_g(objective: str, given: Scores) -> Scores:
    """Return the scores that G's step computes."""
    return given if objective in RELATIVISTIC else Scores(given.fake)


def scores(pairs: int, scale: float) -> Scores:
    random = torch.Generator().manual_seed(pairs)
    real, fake = (
        torch.randn(parts, pairs, generator=random, dtype=torch.float64) * scale for parts in (2, 3)
    )
    return Scores(fake, real)


def test_registry_matches_the_config() -> None:
    assert get_args(LossConfig.model_fields["objective"].annotation) == tuple(OBJECTIVES)
    assert set(D) == set(G) == set(OBJECTIVES)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("pairs", "scale"), [(1, 1.0), (7, 0.1), (64, 4.0)])
def test_losses_equal_the_equations(objective: str, pairs: int, scale: float) -> None:
    given = scores(pairs, scale)
    loss_d = OBJECTIVES[objective](given, "discriminator")
    loss_g = OBJECTIVES[objective](for_g(objective, given), "generator")
    assert loss_d.shape == loss_g.shape == (pairs,)
    real, fake = given.real.T.tolist(), given.fake.T.tolist()
    for i in range(pairs):
        assert loss_d[i].item() == pytest.approx(D[objective](real[i], fake[i]), abs=1e-12)
        assert loss_g[i].item() == pytest.approx(G[objective](real[i], fake[i]), abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_scores_give_finite_losses_and_gradients(objective: str) -> None:
    fake = torch.full((3, 4), 1e4, requires_grad=True)
    for sign in (1, -1):
        given = Scores(fake * sign, fake[:2] * -sign)
        for player in ("discriminator", "generator"):
            loss = OBJECTIVES[objective](given, player).sum()
            (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
            assert loss.isfinite()
            assert gradient.isfinite().all()


def test_pair_critic_is_the_source_formula_for_g() -> None:
    """E[D(g(x))] - E[D(g(z))] over a batch; g(x) is G of either image of a pair."""
    given = scores(50, 3.0)
    of_images = [s for part in (0, 1) for s in given.fake[part].tolist()]
    of_noise = given.fake[2].tolist()
    loss = OBJECTIVES["pair-critic"](Scores(given.fake), "generator").mean().item()
    assert loss == pytest.approx(mean(of_images) - mean(of_noise), abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_d_raises_real_scores_and_lowers_those_of_noise(objective: str) -> None:
    """At scores of 1/2, which lie between all targets."""
    fake = torch.full((3, 5), 0.5, dtype=torch.float64, requires_grad=True)
    real = torch.full((2, 5), 0.5, dtype=torch.float64, requires_grad=True)
    OBJECTIVES[objective](Scores(fake, real), "discriminator").sum().backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad < 0).all()
    assert (fake.grad[2] > 0).all()


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "pair-critic"])
def test_g_raises_the_scores_of_its_fakes(objective: str) -> None:
    fake = torch.full((3, 5), 0.5, dtype=torch.float64, requires_grad=True)
    given = Scores(fake, torch.full((2, 5), 0.5, dtype=torch.float64))
    OBJECTIVES[objective](for_g(objective, given), "generator").sum().backward()
    assert fake.grad is not None
    assert (fake.grad < 0).all()
