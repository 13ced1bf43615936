"""The spread of latent vectors against a loop over them."""

import math

import pytest
import torch

from cl_ray.losses.uniformity import uniformity


def naive(latents: list[list[list[float]]], present: list[bool]) -> list[float]:
    """Of each pair, the mean over its vectors of log mean exp(-2 |u - v|^2) over all others."""

    def direction(vector: list[float]) -> list[float]:
        length = math.sqrt(sum(v * v for v in vector))
        return [v / length for v in vector]

    rows = [
        (part, i, direction(vector))
        for part, vectors in enumerate(latents)
        for i, vector in enumerate(vectors)
    ]
    losses = []
    for pair in range(len(present)):
        total = 0.0
        for part in range(len(latents)):
            own = next(v for p, i, v in rows if (p, i) == (part, pair))
            potentials = [
                math.exp(-2 * sum((a - b) ** 2 for a, b in zip(own, other, strict=True)))
                for p, i, other in rows
                if present[i] and (p, i) != (part, pair)
            ]
            if potentials:
                total += math.log(sum(potentials) / len(potentials))
        losses.append(total / len(latents))
    return losses


@pytest.mark.parametrize("away", [[], [0], [1, 3, 4]])
@pytest.mark.parametrize(("parts", "pairs", "size"), [(1, 6, 3), (2, 5, 8), (3, 7, 2)])
def test_it_is_the_loop(parts: int, pairs: int, size: int, away: list[int]) -> None:
    random = torch.Generator().manual_seed(pairs)
    latents = torch.randn(parts, pairs, size, generator=random, dtype=torch.float64) * 3
    present = torch.ones(pairs, dtype=torch.bool)
    present[away] = False
    loss = uniformity(latents, present)
    assert loss.shape == (pairs,)
    expected = naive(latents.tolist(), present.tolist())
    for i in range(pairs):
        assert math.isfinite(loss[i].item())
        if present[i]:
            assert loss[i].item() == pytest.approx(expected[i], abs=1e-12)


def test_alone_it_is_nothing_and_finite() -> None:
    latents = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = uniformity(latents, torch.tensor([True, False, False]))
    (gradient,) = torch.autograd.grad(loss[0], latents)
    assert loss[0] == 0
    assert (gradient == 0).all()


def test_descended_it_spreads_vectors_over_the_sphere() -> None:
    torch.manual_seed(0)
    latents = (torch.randn(1, 64, 3) * 0.1 + torch.tensor([1.0, 0, 0])).requires_grad_()
    present = torch.ones(64, dtype=torch.bool)
    optimizer = torch.optim.Adam([latents], 0.05)
    for _ in range(200):
        optimizer.zero_grad()
        uniformity(latents, present).mean().backward()
        optimizer.step()
    directions = torch.nn.functional.normalize(latents[0].detach(), dim=1)
    assert directions.mean(0).norm() < 0.05
    covariance = directions.T @ directions / 64
    assert torch.allclose(covariance, torch.eye(3) / 3, atol=0.05)
