"""Each adversarial objective against its equation, written out pair by pair."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from cl_ray.losses.adversarial import OBJECTIVES, RELATIVISTIC, Scores
from cl_ray.losses.config import LossConfig

Of = Callable[[list[float], list[float]], float]
"""A player's loss of one pair, given the scores of x+, x- and of f+, f-, fz."""


def softplus(x: float) -> float:
    return math.log1p(math.exp(-abs(x))) + max(x, 0.0)


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def square(values: list[float]) -> list[float]:
    return [v * v for v in values]


def told_apart(real: list[float], fake: list[float]) -> float:
    return mean([softplus(-s) for s in real]) + mean([softplus(s) for s in fake])


D: dict[str, Of] = {
    "non-saturating": told_apart,
    "minimax": told_apart,
    "hinge": lambda real, fake: (
        mean([max(0, 1 - s) for s in real]) + mean([max(0, 1 + s) for s in fake])
    ),
    "least-squares": lambda real, fake: (
        mean(square([s - 1 for s in real])) / 2 + mean(square(fake)) / 2
    ),
    "wasserstein": lambda real, fake: mean(fake) - mean(real),
    # Of x+, x- and f+, f-, fz: no fake beside the image that it was made of.
    "relativistic": lambda real, fake: mean(
        [softplus(fake[0] - real[1]), softplus(fake[1] - real[0]), softplus(fake[2] - real[0])]
    ),
    # max over D of E[s(g(x))] - E[s(g(z))] and of E[s(x)] - E[s(g(z))], bounded by half of E[s^2].
    "pair-critic": lambda real, fake: (
        -(mean(fake[:2]) - fake[2])
        - (mean(real) - fake[2])
        + 0.5 * (mean(square(real)) + mean(square(fake)))
    ),
}
G: dict[str, Of] = {
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
    """What G's step scores."""
    return given if objective in RELATIVISTIC else Scores(given.fake)


def scores(pairs: int, scale: float) -> Scores:
    random = torch.Generator().manual_seed(pairs)
    real, fake = (
        torch.randn(parts, pairs, generator=random, dtype=torch.float64) * scale for parts in (2, 3)
    )
    return Scores(fake, real)


def test_the_registry_is_the_config_s_choice() -> None:
    assert get_args(LossConfig.model_fields["objective"].annotation) == tuple(OBJECTIVES)
    assert set(D) == set(G) == set(OBJECTIVES)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("pairs", [1, 2, 7, 64])
def test_losses_are_the_equations(objective: str, pairs: int, scale: float) -> None:
    given = scores(pairs, scale)
    loss_d = OBJECTIVES[objective](given, "discriminator")
    loss_g = OBJECTIVES[objective](for_g(objective, given), "generator")
    assert loss_d.shape == loss_g.shape == (pairs,)
    real, fake = given.seen.T.tolist(), given.fake.T.tolist()
    for i in range(pairs):
        assert loss_d[i].item() == pytest.approx(D[objective](real[i], fake[i]), abs=1e-12)
        assert loss_g[i].item() == pytest.approx(G[objective](real[i], fake[i]), abs=1e-12)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_scores_far_out_stay_finite(objective: str) -> None:
    fake = torch.full((3, 4), 1e4, requires_grad=True)
    for sign in (1, -1):
        given = Scores(fake * sign, fake[:2] * -sign)
        for player in ("discriminator", "generator"):
            loss = OBJECTIVES[objective](given, player).sum()  # type: ignore[arg-type]
            (gradient,) = torch.autograd.grad(loss, fake, retain_graph=True)
            assert loss.isfinite()
            assert gradient.isfinite().all()


def test_the_source_formula_is_g_s_to_the_letter() -> None:
    """E[D(g(x))] - E[D(g(z))] over a batch: g(x) is G of either image of a pair, g(z) of noise."""
    given = scores(50, 3.0)
    of_images = [s for part in (0, 1) for s in given.fake[part].tolist()]
    of_noise = given.fake[2].tolist()
    loss = OBJECTIVES["pair-critic"](Scores(given.fake), "generator").mean().item()
    assert loss == pytest.approx(mean(of_images) - mean(of_noise), abs=1e-12)
    # G's loss goes down where the score of g(x) does and where that of g(z) goes up.
    fake = given.fake.clone().requires_grad_()
    OBJECTIVES["pair-critic"](Scores(fake), "generator").mean().backward()
    assert fake.grad is not None
    assert torch.equal(fake.grad[0], torch.full((50,), 1 / 100, dtype=torch.float64))
    assert torch.equal(fake.grad[1], fake.grad[0])
    assert torch.equal(fake.grad[2], torch.full((50,), -1 / 50, dtype=torch.float64))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_d_wants_real_images_above_fakes_of_noise(objective: str) -> None:
    """At scores of 1/2, between all targets, D raises every real one and lowers that of noise."""
    fake = torch.full((3, 5), 0.5, dtype=torch.float64, requires_grad=True)
    real = torch.full((2, 5), 0.5, dtype=torch.float64, requires_grad=True)
    OBJECTIVES[objective](Scores(fake, real), "discriminator").sum().backward()
    assert real.grad is not None
    assert fake.grad is not None
    assert (real.grad < 0).all()
    assert (fake.grad[2] > 0).all()


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "pair-critic"])
def test_g_wants_its_fakes_taken_for_real(objective: str) -> None:
    fake = torch.full((3, 5), 0.5, dtype=torch.float64, requires_grad=True)
    given = Scores(fake, torch.full((2, 5), 0.5, dtype=torch.float64))
    OBJECTIVES[objective](for_g(objective, given), "generator").sum().backward()
    assert fake.grad is not None
    assert (fake.grad < 0).all()


def test_minimax_and_non_saturating_differ_where_d_is_sure() -> None:
    """Goodfellow's reason for the second: at s(f) -> -inf the first has no slope left."""
    fake = torch.full((3, 1), -20.0, dtype=torch.float64, requires_grad=True)
    slopes = {}
    for objective in ("minimax", "non-saturating"):
        loss = OBJECTIVES[objective](Scores(fake), "generator").sum()
        slopes[objective] = torch.autograd.grad(loss, fake)[0].abs().max().item()
    assert slopes["minimax"] < 1e-8
    assert slopes["non-saturating"] == pytest.approx(1 / 3, rel=1e-6)
