"""InfoNCE and ContraD's loss of fakes against loops over queries and keys."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl_ray.losses.contrastive import fake_supcon, info_nce

Vectors = list[list[list[float]]]
"""Unit vectors by part and pair."""
MASKS = {
    "all": lambda n: [True] * n,
    "last absent": lambda n: [i < n - 1 for i in range(n)],
    "scattered": lambda n: [i % 3 != 1 for i in range(n)],
}


def sample_embeddings(parts: int, pairs: int, size: int) -> Tensor:
    random = torch.Generator().manual_seed(100 * parts + pairs)
    return normalize(torch.randn(parts, pairs, size, generator=random, dtype=torch.float64), dim=2)


def similarities(
    parts: Vectors, query: tuple[int, int], present: list[bool], temperature: float
) -> dict[tuple[int, int], float]:
    """Return the query's similarity to every key: all present vectors except itself."""
    vector = parts[query[0]][query[1]]
    return {
        (part, i): sum(a * b for a, b in zip(vector, key, strict=True)) / temperature
        for part, keys in enumerate(parts)
        for i, key in enumerate(keys)
        if present[i] and (part, i) != query
    }


def naive_info_nce(parts: Vectors, i: int, present: list[bool], temperature: float) -> float:
    """Parts 0 and 1 are the two views; the mean over the image's two queries."""
    total = 0.0
    for view in (0, 1):
        keys = similarities(parts, (view, i), present, temperature)
        total += math.log(sum(map(math.exp, keys.values()))) - keys[1 - view, i]
    return total / 2


def naive_fake_supcon(
    parts: Vectors, fakes: int, i: int, present: list[bool], temperature: float
) -> float:
    """The first parts are fakes; the mean over the pair's fakes as queries."""
    total = 0.0
    for part in range(fakes):
        keys = similarities(parts, (part, i), present, temperature)
        positives = [value for (other, _), value in keys.items() if other < fakes]
        if positives:
            log_partition = math.log(sum(map(math.exp, keys.values())))
            total += log_partition - sum(positives) / len(positives)
    return total / fakes


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [0.05, 10.0])
@pytest.mark.parametrize(("pairs", "others"), [(1, 1), (3, 0), (5, 4)])
def test_info_nce_equals_the_loop(pairs: int, others: int, temperature: float, mask: str) -> None:
    parts, present = sample_embeddings(2 + others, pairs, 6), MASKS[mask](pairs)
    loss = info_nce(parts[0], parts[1], list(parts[2:]), torch.tensor(present), temperature)
    assert loss.shape == (pairs,)
    assert loss.isfinite().all()
    for i in (i for i in range(pairs) if present[i]):
        expected = naive_info_nce(parts.tolist(), i, present, temperature)
        assert loss[i].item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("temperature", [0.05, 10.0])
@pytest.mark.parametrize(("pairs", "fakes"), [(1, 1), (1, 3), (5, 3)])
def test_fake_supcon_equals_the_loop(pairs: int, fakes: int, temperature: float, mask: str) -> None:
    parts, present = sample_embeddings(fakes + 2, pairs, 6), MASKS[mask](pairs)
    *queries, view1, view2 = parts
    loss = fake_supcon(queries, view1, view2, torch.tensor(present), temperature)
    assert loss.shape == (pairs,)
    assert loss.isfinite().all()
    for i in (i for i in range(pairs) if present[i]):
        expected = naive_fake_supcon(parts.tolist(), fakes, i, present, temperature)
        assert loss[i].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_absent_rows_have_no_effect_on_values_and_gradients() -> None:
    parts = sample_embeddings(6, 7, 5)
    present = torch.tensor([True, False, True, True, False, False, True])
    leaf = parts.clone().requires_grad_()
    loss = info_nce(leaf[0], leaf[1], list(leaf[2:]), present, 0.2)
    (gradient,) = torch.autograd.grad((loss * present).sum(), leaf)
    assert (gradient[:, ~present] == 0).all()
    assert (gradient[:, present] != 0).any(2).all()
    without = parts[:, present]  # the absent rows left out
    expected = info_nce(without[0], without[1], list(without[2:]), present[present], 0.2)
    assert torch.allclose(loss[present], expected, rtol=0, atol=1e-12)
    parts[:, ~present] = parts[:, :1].clone()  # the absent rows replaced
    again = info_nce(parts[0], parts[1], list(parts[2:]), present, 0.2)
    assert torch.equal(again[present], loss[present])


def test_rank_without_present_rows_is_finite() -> None:
    parts = sample_embeddings(6, 3, 5).requires_grad_()
    loss = info_nce(parts[0], parts[1], list(parts[2:]), torch.zeros(3, dtype=torch.bool), 0.2)
    (gradient,) = torch.autograd.grad((loss * 0).sum(), parts)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
