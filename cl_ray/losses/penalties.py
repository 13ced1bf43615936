"""What keeps D's score smooth."""

import math

import torch
from torch import Tensor

WORD = 64
"""Random signs that one whole number carries."""


def approximate_r1(scores: Tensor, disturbed: Tensor, spread: float) -> Tensor:
    """Half the squared slope of D's score at real images, by a finite difference.

    R1 is |grad s(x)|^2 / 2 (Mescheder et al., 2018, equation 9). A random direction n with
    independent entries of unit variance has E[(n . grad s)^2] = |grad s|^2, so the difference of
    two scores is enough, at no second backward pass (Lin et al., 2025, Diffusion Adversarial
    Post-Training, section 3.4, who leave out the division).

    Args:
        scores: s(x) of b real images, [b].
        disturbed: s(x + spread n) of the same, [b].
        spread: Length of a step in every pixel; images are in [-1, 1].

    Returns:
        [b], 0 or more.
    """
    return ((disturbed - scores) / spread).square() / 2


def draw_signs(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random signs for `count` images, 64 to a number: drawing one by one would take a GPU's time.

    Returns:
        Int64 [count, words], to be read by `signs`.
    """
    words = torch.empty(count, math.ceil(math.prod(shape) / WORD), dtype=torch.int64)
    return words.random_(-(2**63), None, generator=generator)


def signs(drawn: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The drawn [b, words] as an int64 tensor of -1 and 1, [b, *shape]."""
    bits = (drawn[:, :, None] >> torch.arange(WORD, device=drawn.device)) & 1
    return (bits * 2 - 1).flatten(1)[:, : math.prod(shape)].view(len(drawn), *shape)
