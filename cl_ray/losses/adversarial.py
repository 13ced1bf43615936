"""Adversarial objectives: losses of D and G on the scores of real images and fakes.

An objective is one function of the scores and the player, and one entry of OBJECTIVES. It returns
that player's loss of each pair, [b]. What else is to be known of it is in `losses/config.py`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from cl_ray.batch import DiscriminatorOutput, FakeParts, RealParts, stack_scores

Player = Literal["discriminator", "generator"]


@dataclass(frozen=True)
class Scores:
    """D's scores of b pairs; high is real.

    Args:
        fake: [3, b]: of G(x+), G(x-) and G(z).
        given_real: [2, b]: of x+ and x-. None in G's step, unless the objective is in RELATIVISTIC
            (`losses/config.py`): other objectives have no gradient through them.
    """

    fake: Tensor
    given_real: Tensor | None = None

    @classmethod
    def stack(
        cls,
        fake: FakeParts[DiscriminatorOutput],
        real: RealParts[DiscriminatorOutput] | None = None,
    ) -> "Scores":
        """Stack the scores of D's output by name."""
        return cls(stack_scores(fake), None if real is None else stack_scores(real))

    @property
    def real(self) -> Tensor:
        """Scores of x+ and x-, [2, b]."""
        assert self.given_real is not None, (
            "the real images were not scored in this step: an objective whose loss of G needs them "
            "belongs in RELATIVISTIC"
        )
        return self.given_real


def minimax(scores: Scores, player: Player) -> Tensor:
    """Goodfellow et al. (2014), equation 1, on logits: G minimizes log(1 - D(f)) itself.

    D: mean softplus(-s(x)) + mean softplus(s(f)); G: -mean softplus(s(f)).
    """
    if player == "generator":
        return -softplus(scores.fake).mean(0)
    return non_saturating(scores, player)


def non_saturating(scores: Scores, player: Player) -> Tensor:
    """Goodfellow et al. (2014), equation 1 for D and section 3's -log D(G(z)) for G, on logits.

    D: mean softplus(-s(x)) + mean softplus(s(f)); G: mean softplus(-s(f)).
    """
    if player == "generator":
        return softplus(-scores.fake).mean(0)
    return softplus(-scores.real).mean(0) + softplus(scores.fake).mean(0)


def pair_critic(scores: Scores, player: Player) -> Tensor:
    """The source formula min_g E[D(g(x))] - E[D(g(z))], to the letter for G.

    Interpretation: D is the score s; g(x) is G of either image of the pair, so E[D(g(x))] is the
    mean of s(G(x+)) and s(G(x-)); g(z) is G(z). The formula gives D no loss, no real image and no
    bound. So D maximizes it, and also separates real images from fakes of noise, E[s(x)] -
    E[s(G(z))]; otherwise nothing would tie the game to the data. The mean square of the scores
    (Fisher GAN: Mroueh and Sercu, 2017, equation 3; here its constraint is a penalty of weight
    1/2) bounds both differences without a second backward pass.
    """
    of_images, of_noise = scores.fake[:2].mean(0), scores.fake[2]
    if player == "generator":
        return of_images - of_noise
    real = scores.real.mean(0)
    bound = scores.real.square().mean(0) + scores.fake.square().mean(0)
    return -(of_images - of_noise) - (real - of_noise) + 0.5 * bound


def hinge(scores: Scores, player: Player) -> Tensor:
    """Lim and Ye (2017); Miyato et al. (2018), equations 16 and 17.

    D: mean max(0, 1 - s(x)) + mean max(0, 1 + s(f)); G: -mean s(f).
    """
    if player == "generator":
        return -scores.fake.mean(0)
    return relu(1 - scores.real).mean(0) + relu(1 + scores.fake).mean(0)


def least_squares(scores: Scores, player: Player) -> Tensor:
    """Mao et al. (2017), equation 9: targets 1 for real and 0 for fake, G's target 1.

    D: mean (s(x) - 1)^2 / 2 + mean s(f)^2 / 2; G: mean (s(f) - 1)^2 / 2.
    """
    if player == "generator":
        return (scores.fake - 1).square().mean(0) / 2
    return ((scores.real - 1).square().mean(0) + scores.fake.square().mean(0)) / 2


def wasserstein(scores: Scores, player: Player) -> Tensor:
    """Arjovsky et al. (2017), equation 2; `losses.gradient_penalty` bounds D's gradient.

    D: mean s(f) - mean s(x); G: -mean s(f).
    """
    if player == "generator":
        return -scores.fake.mean(0)
    return scores.fake.mean(0) - scores.real.mean(0)


def relativistic(scores: Scores, player: Player) -> Tensor:
    """Relativistic pairing (Jolicoeur-Martineau, 2018; R3GAN: Huang et al., 2024, equation 2).

    D: mean softplus(s(f) - s(x)); G: mean softplus(s(x) - s(f)). Pairs are independent draws: each
    fake is compared with a real image that it was not made from, G(x+) with x-, G(x-) with x+ and
    G(z) with x+.
    """
    x_positive, x_negative = scores.real
    margin = scores.fake - torch.stack([x_negative, x_positive, x_positive])
    return softplus(margin if player == "discriminator" else -margin).mean(0)


OBJECTIVES: dict[str, Callable[[Scores, Player], Tensor]] = {
    "non-saturating": non_saturating,
    "pair-critic": pair_critic,
    "minimax": minimax,
    "hinge": hinge,
    "least-squares": least_squares,
    "wasserstein": wasserstein,
    "relativistic": relativistic,
}
