"""Uniformity of latent vectors against a loop."""

import math

import pytest
import torch

from cl_ray.losses.uniformity import uniformity


def naive_uniformity(directions: list[list[list[float]]], i: int, present: list[bool]) -> float:
    """Mean over the pair's vectors of log mean exp(-2 |u - v|^2) over all others."""
    total = 0.0
    for part in range(len(directions)):
        potentials = [
            math.exp(-2 * sum((a - b) ** 2 for a, b in zip(directions[part][i], v, strict=True)))
            for other, vectors in enumerate(directions)
            for j, v in enumerate(vectors)
            if present[j] and (other, j) != (part, i)
        ]
        total += math.log(sum(potentials) / len(potentials)) if potentials else 0.0
    return total / len(directions)


@pytest.mark.parametrize("absent", [[], [0], [1, 3, 4]])
@pytest.mark.parametrize(("parts", "pairs", "size"), [(1, 6, 3), (2, 5, 8), (3, 7, 2)])
def test_equals_the_loop(parts: int, pairs: int, size: int, absent: list[int]) -> None:
    random = torch.Generator().manual_seed(pairs)
    latents = torch.randn(parts, pairs, size, generator=random, dtype=torch.float64) * 3
    present = torch.ones(pairs, dtype=torch.bool)
    present[absent] = False
    loss = uniformity(latents, present)
    assert loss.shape == (pairs,)
    assert loss.isfinite().all()
    directions = (latents / latents.norm(dim=2, keepdim=True)).tolist()
    for i in present.nonzero().flatten().tolist():
        expected = naive_uniformity(directions, i, present.tolist())
        assert loss[i].item() == pytest.approx(expected, abs=1e-12)


def test_single_vector_has_loss_and_gradient_zero() -> None:
    latents = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = uniformity(latents, torch.tensor([True, False, False]))
    (gradient,) = torch.autograd.grad(loss[0], latents)
    assert loss[0] == 0
    assert (gradient == 0).all()
