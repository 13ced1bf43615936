"""InfoNCE against a loop over queries and keys."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl_ray.losses.contrastive import fake_supcon, info_nce


def embeddings(parts: int, pairs: int, size: int) -> Tensor:
    random = torch.Generator().manual_seed(100 * parts + pairs)
    return normalize(torch.randn(parts, pairs, size, generator=random, dtype=torch.float64), dim=2)


def naive(parts: list[list[list[float]]], present: list[bool], temperature: float) -> list[float]:
    """Parts 0 and 1 are the two views; each present image's mean over its two queries."""
    losses = []
    for i, is_there in enumerate(present):
        total = 0.0
        for view in (0, 1) if is_there else ():
            query, sums, wanted = parts[view][i], 0.0, math.nan
            for part, rows in enumerate(parts):
                for j, key in enumerate(rows):
                    if not present[j] or (part, j) == (view, i):
                        continue
                    cosine = sum(a * b for a, b in zip(query, key, strict=True))
                    sums += math.exp(cosine / temperature)
                    if (part, j) == (1 - view, i):
                        wanted = cosine / temperature
            total += math.log(sums) - wanted
        losses.append(total / 2)
    return losses


MASKS = {
    "all": lambda n: [True] * n,
    "last away": lambda n: [i < n - 1 for i in range(n)],
    "first away": lambda n: [i > 0 for i in range(n)],
    "scattered": lambda n: [i % 3 != 1 for i in range(n)],
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 10.0])
@pytest.mark.parametrize(("pairs", "others"), [(1, 1), (2, 1), (3, 0), (5, 4), (9, 2)])
def test_it_is_the_loop(pairs: int, others: int, temperature: float, mask: str) -> None:
    parts = embeddings(2 + others, pairs, 6)
    present = MASKS[mask](pairs)
    loss = info_nce(parts[0], parts[1], parts[2:], torch.tensor(present), temperature)
    assert loss.shape == (pairs,)
    expected = naive(parts.tolist(), present, temperature)
    for i in range(pairs):
        assert math.isfinite(loss[i].item())
        if present[i]:
            assert loss[i].item() == pytest.approx(expected[i], abs=1e-12)


def test_absent_rows_count_for_nothing_in_value_and_gradient() -> None:
    parts = embeddings(6, 7, 5)
    present = torch.tensor([True, False, True, True, False, False, True])
    leaf = parts.clone().requires_grad_()
    loss = info_nce(leaf[0], leaf[1], leaf[2:], present, 0.2)
    (gradient,) = torch.autograd.grad((loss * present).sum(), leaf)
    assert (gradient[:, ~present] == 0).all()
    assert (gradient[:, present] != 0).any(2).all()
    # The same as if they had never been there.
    alone = info_nce(
        parts[0, present], parts[1, present], parts[2:, present], present[present], 0.2
    )
    assert torch.allclose(loss[present], alone, rtol=0, atol=1e-12)
    # And whatever they hold.
    parts[:, ~present] = parts[:, :1].clone()
    again = info_nce(parts[0], parts[1], parts[2:], present, 0.2)
    assert torch.equal(again[present], loss[present])


def test_a_rank_of_absent_rows_alone_is_finite() -> None:
    parts = embeddings(6, 3, 5).requires_grad_()
    loss = info_nce(parts[0], parts[1], parts[2:], torch.zeros(3, dtype=torch.bool), 0.2)
    (gradient,) = torch.autograd.grad((loss * 0).sum(), parts)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()


def test_nearer_views_are_better_and_more_to_push_away_is_worse() -> None:
    parts = embeddings(3, 8, 6)
    present = torch.ones(8, dtype=torch.bool)
    before = info_nce(parts[0], parts[1], parts[2:], present, 0.2)
    assert (info_nce(parts[0], parts[0], parts[2:], present, 0.2) < before).all()
    assert (info_nce(parts[0], parts[1], parts[:0], present, 0.2) < before).all()


def naive_fakes(
    parts: list[list[list[float]]], fakes: int, present: list[bool], temperature: float
) -> list[float]:
    """The first parts are fakes; each pair's mean over its fakes as queries."""
    rows = [
        (part, i, vector)
        for part, vectors in enumerate(parts)
        for i, vector in enumerate(vectors)
        if present[i]
    ]
    losses = []
    for pair in range(len(present)):
        total = 0.0
        for part in range(fakes):
            query = parts[part][pair]
            keys = [
                (other, sum(a * b for a, b in zip(query, key, strict=True)) / temperature)
                for other, i, key in rows
                if (other, i) != (part, pair)
            ]
            whole = math.log(sum(math.exp(likeness) for _, likeness in keys)) if keys else 0.0
            alike = [likeness for other, likeness in keys if other < fakes]
            total += whole - sum(alike) / len(alike) if alike else 0.0
        losses.append(total / fakes)
    return losses


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [0.05, 0.2, 1.0, 10.0])
@pytest.mark.parametrize(("pairs", "fakes"), [(1, 1), (1, 3), (2, 1), (5, 3), (9, 2)])
def test_fakes_as_one_is_the_loop(pairs: int, fakes: int, temperature: float, mask: str) -> None:
    parts = embeddings(fakes + 2, pairs, 6)
    present = MASKS[mask](pairs)
    loss = fake_supcon(
        parts[:fakes], parts[fakes], parts[fakes + 1], torch.tensor(present), temperature
    )
    assert loss.shape == (pairs,)
    expected = naive_fakes(parts.tolist(), fakes, present, temperature)
    for i in range(pairs):
        assert math.isfinite(loss[i].item())
        if present[i]:
            assert loss[i].item() == pytest.approx(expected[i], rel=1e-12, abs=1e-12)
