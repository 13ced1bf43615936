"""Adversarial objectives: what the scores of real and fake images are worth to D and to G.

An objective is one function of the scores and the player, registered by one line in OBJECTIVES.
It returns the player's loss for each pair of the batch; lower is better for that player.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

Player = Literal["discriminator", "generator"]


@dataclass(frozen=True)
class Scores:
    """D's scores of one batch of b pairs; high is real.

    Args:
        fake: [3, b]: of f+ = G(x+), f- = G(x-) and fz = G(z).
        real: [2, b]: of x+ and x-. In G's step only the objectives of RELATIVE are given them:
            D's view of real images is nothing that G could move.
    """

    fake: Tensor
    real: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """The real scores, which D's step always has."""
        assert self.real is not None, "the step did not score the real images"
        return self.real


def minimax(scores: Scores, player: Player) -> Tensor:
    """Goodfellow et al. (2014), equation 1, on logits: G minimises log(1 - D(f)) itself.

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
    return softplus(-scores.seen).mean(0) + softplus(scores.fake).mean(0)


def pair_critic(scores: Scores, player: Player) -> Tensor:
    """The source formula min_g E[D(g(x))] - E[D(g(z))], to the letter for G.

    The reading: D is the score s; g(x) is G of either image of the pair, so E[D(g(x))] is the
    mean of s(f+) and s(f-); g(z) is G of noise, fz. The printed formula gives D no loss, no real
    image and no bound. D therefore plays the opposing maximum, and tells real images from noise
    fakes besides, E[s(x)] - E[s(fz)], or nothing would tie the game to the data. The mean square
    of the scores (Fisher GAN: Mroueh and Sercu, 2017, equation 3, its constraint here a penalty
    of weight 1/2) keeps both differences bounded, at no second backward pass.
    """
    of_images, of_noise = scores.fake[:2].mean(0), scores.fake[2]
    if player == "generator":
        return of_images - of_noise
    real = scores.seen.mean(0)
    bound = scores.seen.square().mean(0) + scores.fake.square().mean(0)
    return -(of_images - of_noise) - (real - of_noise) + 0.5 * bound


def hinge(scores: Scores, player: Player) -> Tensor:
    """Lim and Ye (2017); Miyato et al. (2018), equations 16 and 17.

    D: mean max(0, 1 - s(x)) + mean max(0, 1 + s(f)); G: -mean s(f).
    """
    if player == "generator":
        return -scores.fake.mean(0)
    return relu(1 - scores.seen).mean(0) + relu(1 + scores.fake).mean(0)


def least_squares(scores: Scores, player: Player) -> Tensor:
    """Mao et al. (2017), equation 9: targets 1 for real and 0 for fake, G's target 1.

    D: mean (s(x) - 1)^2 / 2 + mean s(f)^2 / 2; G: mean (s(f) - 1)^2 / 2.
    """
    if player == "generator":
        return (scores.fake - 1).square().mean(0) / 2
    return ((scores.seen - 1).square().mean(0) + scores.fake.square().mean(0)) / 2


def wasserstein(scores: Scores, player: Player) -> Tensor:
    """Arjovsky et al. (2017), equation 2; D's slope is bounded by `losses.gradient_penalty`.

    D: mean s(f) - mean s(x); G: -mean s(f).
    """
    if player == "generator":
        return -scores.fake.mean(0)
    return scores.fake.mean(0) - scores.seen.mean(0)


def relativistic(scores: Scores, player: Player) -> Tensor:
    """Relativistic pairing (Jolicoeur-Martineau, 2018; R3GAN: Huang et al., 2024, equation 2).

    D: mean softplus(s(f) - s(x)); G: mean softplus(s(x) - s(f)). Each fake is set against a real
    image that it was not made of, as the pairing of independent draws asks: f+ against x-,
    f- against x+, fz against x+.
    """
    x_positive, x_negative = scores.seen
    margin = scores.fake - torch.stack([x_negative, x_positive, x_positive])
    return softplus(margin if player == "discriminator" else -margin).mean(0)


Objective = Callable[[Scores, Player], Tensor]

OBJECTIVES: dict[str, Objective] = {
    "non-saturating": non_saturating,
    "pair-critic": pair_critic,
    "minimax": minimax,
    "hinge": hinge,
    "least-squares": least_squares,
    "wasserstein": wasserstein,
    "relativistic": relativistic,
}

RELATIVISTIC = {"relativistic"}
"""Objectives that set G's fakes against real images, and so need their scores in G's step."""
