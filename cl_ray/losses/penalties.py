"""Gradient penalties that keep D's score smooth."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from cl_ray.batch import Losses
from cl_ray.losses.config import LossConfig
from cl_ray.networks.discriminator import Discriminator

BITS_PER_WORD = 64


class PenaltyNoise(NamedTuple):
    """Random inputs of the penalties.

    Args:
        rademacher_bits: Directions of the approximate R1 penalty, by `sample_rademacher`.
        interpolation_alpha: Positions of the gradient penalty between fakes and real images, [b]
            in [0, 1].
    """

    rademacher_bits: Tensor
    interpolation_alpha: Tensor


def discriminator_penalties(
    discriminator: Discriminator,
    config: LossConfig,
    real: Tensor,
    fake: Tensor,
    noise: PenaltyNoise,
    labels: Tensor | None = None,
) -> Losses:
    """Compute the penalties whose weight is not 0, outside of autocast.

    Args:
        discriminator: D.
        config: The weights, and the step of the finite difference.
        real: x+ as D sees it, [b, C, H, W].
        fake: G(z) as D sees it, detached from G, [b, C, H, W].
        noise: Random inputs of the penalties.
        labels: Classes of x+ and G(z), [b], if D is a projection discriminator.
    """

    def gradient(images: Tensor) -> Tensor:
        return input_gradient(
            lambda x: discriminator.scores(discriminator.features(x), labels), images
        )

    losses: Losses = {}
    with torch.autocast(real.device.type, enabled=False):
        if config.approximate_r1:
            direction = rademacher(noise.rademacher_bits, real.shape[1:]).to(real.dtype)
            # One pass for both: spectral norm updates its estimate in every pass.
            both = torch.cat([real, real + config.r1_step * direction])
            features = discriminator.features(both)
            if config.form == "contrad":
                features = features.detach()
            both_labels = None if labels is None else labels.repeat(2)
            score, perturbed = discriminator.scores(features, both_labels).chunk(2)
            losses["approximate_r1"] = approximate_r1(score, perturbed, config.r1_step)
        if config.r1:
            losses["r1"] = zero_centered_penalty(gradient(real))
        if config.r2:
            losses["r2"] = zero_centered_penalty(gradient(fake))
        if config.gradient_penalty:
            points = interpolate(real, fake, noise.interpolation_alpha)
            losses["gradient_penalty"] = gradient_penalty(gradient(points))
    return losses


def approximate_r1(score: Tensor, perturbed: Tensor, step: float) -> Tensor:
    """Compute R1, half the squared gradient of the score at real images, by a finite difference.

    R1 is |grad s(x)|^2 / 2 (Mescheder et al., 2018, equation 9). A random direction n of
    independent entries with unit variance has E[(n . grad s)^2] = |grad s|^2. So the difference of
    two scores estimates it without a second backward pass (Lin et al., 2025, Diffusion Adversarial
    Post-Training, section 3.4, there without the division).

    Args:
        score: s(x) of real images, [b].
        perturbed: s(x + step n), [b].
        step: Size of the step in each pixel; images are in [-1, 1].
    """
    return ((perturbed - score) / step).square() / 2


def zero_centered_penalty(gradient: Tensor) -> Tensor:
    """Compute |grad s|^2 / 2, [b], of an `input_gradient`: R1 on real images and R2 on fakes.

    Mescheder et al. (2018), equation 9 and the paragraph after it; the weight is their gamma.
    """
    return gradient.square().sum(1) / 2


def gradient_penalty(gradient: Tensor) -> Tensor:
    """Compute (|grad s| - 1)^2, [b], of an `input_gradient`.

    Gulrajani et al. (2017), equation 3, without lambda.
    """
    return (torch.linalg.vector_norm(gradient, dim=1) - 1).square()


def input_gradient(score: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Compute the gradient [b, C H W] of each score with respect to its image, differentiable.

    `score` returns the scores [b] of images [b, C, H, W]; each depends on its own image only.
    """
    images = images.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(score(images).sum(), images, create_graph=True)
    return gradient.flatten(1)


def interpolate(real: Tensor, fake: Tensor, alpha: Tensor) -> Tensor:
    """Compute points between fakes and real images (Gulrajani et al., 2017, algorithm 1).

    `alpha` [b], in [0, 1], is the fraction of the real image.
    """
    return torch.lerp(fake, real, alpha[:, None, None, None])


def sample_rademacher(count: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Sample random signs for `count` images, packed 64 to a word to keep the CPU's part short.

    Returns:
        Int64 [count, words], to be unpacked by `rademacher`.
    """
    words = torch.empty(count, math.ceil(math.prod(shape) / BITS_PER_WORD), dtype=torch.int64)
    return words.random_(-(2**63), None, generator=generator)


def rademacher(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack bits [b, words] to an int64 tensor of -1 and 1, [b, *shape]."""
    bits = (packed[:, :, None] >> torch.arange(BITS_PER_WORD, device=packed.device)) & 1
    return (bits * 2 - 1).flatten(1)[:, : math.prod(shape)].view(len(packed), *shape)
