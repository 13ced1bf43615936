"""Each adversarial objective against its equation, pair by pair."""

from pathlib import Path
from typing import get_args

import pytest
import torch
import yaml
from helpers.naive_gan import D_OBJECTIVES, G_OBJECTIVES

from cl_ray.losses.adversarial import OBJECTIVES, Scores
from cl_ray.losses.config import RELATIVISTIC, UNBOUNDED, Objective


def for_g(objective: str, given: Scores) -> Scores:
    """Return the scores that G's step computes."""
    return given if objective in RELATIVISTIC else Scores(given.fake)


def scores(pairs: int, scale: float) -> Scores:
    random = torch.Generator().manual_seed(pairs)
    real, fake = (
        torch.randn(parts, pairs, generator=random, dtype=torch.float64) * scale for parts in (2, 3)
    )
    return Scores(fake, real)


def test_every_list_of_objectives_is_whole() -> None:
    space = Path(__file__).parents[2] / "cl_ray/tuning/spaces/objectives.yaml"
    places = {
        "Objective of cl_ray/losses/config.py": get_args(Objective),
        "D_OBJECTIVES of tests/helpers/naive_gan.py": D_OBJECTIVES,
        "G_OBJECTIVES of tests/helpers/naive_gan.py": G_OBJECTIVES,
        str(space): yaml.safe_load(space.read_text())["losses.objective"]["values"],
    }
    incomplete = [place for place, names in places.items() if set(names) != set(OBJECTIVES)]
    assert not incomplete, "give these the names of OBJECTIVES"


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(("pairs", "scale"), [(1, 1.0), (7, 0.1), (64, 4.0)])
def test_losses_equal_the_equations(objective: str, pairs: int, scale: float) -> None:
    given = scores(pairs, scale)
    loss_d = OBJECTIVES[objective](given, "discriminator")
    loss_g = OBJECTIVES[objective](for_g(objective, given), "generator")
    assert loss_d.shape == loss_g.shape == (pairs,)
    for i in range(pairs):
        of_pair = given.real[:, i].unbind(), given.fake[:, i].unbind()
        for loss, equation in ((loss_d, D_OBJECTIVES), (loss_g, G_OBJECTIVES)):
            expected = equation[objective](*of_pair).item()
            assert loss[i].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("objective", sorted(RELATIVISTIC))
def test_g_compares_with_real_images_only_where_these_are_scored_for_it(objective: str) -> None:
    """Scoring them takes a pass of D in each step of G."""
    real = scores(7, 1.0).real.requires_grad_()
    OBJECTIVES[objective](Scores(scores(7, 1.0).fake, real), "generator").sum().backward()
    assert real.grad is not None, "G's loss does not need real images: not in RELATIVISTIC"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_d_needs_a_gradient_penalty_only_where_its_loss_has_no_minimum(objective: str) -> None:
    far = torch.tensor([-1e4, -10.0, 0.0, 10.0, 1e4])
    real, fake = torch.meshgrid(far, far, indexing="ij")
    given = Scores(fake.flatten().expand(3, -1), real.flatten().expand(2, -1))
    lowest = OBJECTIVES[objective](given, "discriminator").min().item()
    where = "belongs in" if lowest < -100 else "does not belong in"
    assert (lowest < -100) == (objective in UNBOUNDED), f"{objective} {where} UNBOUNDED"


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
