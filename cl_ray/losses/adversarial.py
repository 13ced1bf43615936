"""Adversarial objectives: what the scores of real and fake images are worth to D and to G.

An objective is one function of the scores and the player, registered by one line in OBJECTIVES.
It returns the player's loss for each pair of the batch; lower is better for that player.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

Player = Literal["discriminator", "generator"]


@dataclass(frozen=True)
class Scores:
    """D's scores of one batch of b pairs; high is real.

    Args:
        fake: [3, b]: of f+ = G(x+), f- = G(x-) and fz = G(z).
        real: [2, b]: of x+ and x-. Absent in G's step, which D's view of real images cannot move.
    """

    fake: Tensor
    real: Tensor | None = None

    @property
    def seen(self) -> Tensor:
        """The real scores, which D's step always has."""
        assert self.real is not None, "only D's step scores real images"
        return self.real


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


Objective = Callable[[Scores, Player], Tensor]

OBJECTIVES: dict[str, Objective] = {
    "non-saturating": non_saturating,
    "pair-critic": pair_critic,
}
