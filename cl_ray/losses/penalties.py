"""What keeps D's score smooth."""

import math
from collections.abc import Callable

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


def sample_rademacher(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random signs for `count` images, 64 to a number: drawing one by one would take a GPU's time.

    Returns:
        Int64 [count, words], to be read by `signs`.
    """
    words = torch.empty(count, math.ceil(math.prod(shape) / WORD), dtype=torch.int64)
    return words.random_(-(2**63), None, generator=generator)


def rademacher(drawn: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The drawn [b, words] as an int64 tensor of -1 and 1, [b, *shape]."""
    bits = (drawn[:, :, None] >> torch.arange(WORD, device=drawn.device)) & 1
    return (bits * 2 - 1).flatten(1)[:, : math.prod(shape)].view(len(drawn), *shape)


def input_gradient(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The gradient of each image's score towards that image, to be differentiated once more.

    Args:
        score: Gives the scores [b] of images; an image's score depends on that image alone.
        images: [b, C, H, W].

    Returns:
        [b, C H W].
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(images).sum(), images, create_graph=True)
    return gradient.flatten(1)


def zero_centered_penalty(slopes: Tensor) -> Tensor:
    """|grad s|^2 / 2, [b]: R1 of real images and R2 of fakes.

    Mescheder et al. (2018), equation 9 and the paragraph after it; the weight is their gamma.
    """
    return slopes.square().sum(1) / 2


def gradient_penalty(slopes: Tensor) -> Tensor:
    """(|grad s| - 1)^2, [b]: Gulrajani et al. (2017), equation 3, its penalty without lambda."""
    return (torch.linalg.vector_norm(slopes, dim=1) - 1).square()


def interpolate(real: Tensor, fake: Tensor, share: Tensor) -> Tensor:
    """Points on the lines from fakes to real images, where Gulrajani et al. take the slope.

    Args:
        real: [b, C, H, W].
        fake: [b, C, H, W].
        share: How much of the real image, [b] in [0, 1].
    """
    return torch.lerp(fake, real, share[:, None, None, None])
