"""InfoNCE against a loop over queries and keys, and edge cases; a step's losses in test_gan.py."""

import pytest
import torch
from helpers import naive_gan
from torch import Tensor
from torch.nn.functional import normalize

from cl_ray.losses.contrastive import fake_supcon, info_nce


def sample_embeddings(parts: int, pairs: int, size: int) -> Tensor:
    random = torch.Generator().manual_seed(100 * parts + pairs)
    return normalize(torch.randn(parts, pairs, size, generator=random, dtype=torch.float64), dim=2)


@pytest.mark.parametrize("absent", [[], [4], [1, 4]])
@pytest.mark.parametrize("temperature", [0.05, 10.0])
@pytest.mark.parametrize(("pairs", "others"), [(1, 1), (3, 0), (5, 4)])
def test_info_nce_equals_the_loop(
    pairs: int, others: int, temperature: float, absent: list[int]
) -> None:
    parts = sample_embeddings(2 + others, pairs, 6)
    present = torch.tensor([pair not in absent for pair in range(pairs)])
    loss = info_nce(parts[0], parts[1], list(parts[2:]), present, temperature)
    assert loss.shape == (pairs,)
    assert loss.isfinite().all()
    view1, view2, *negatives = parts[:, present]
    expected = naive_gan.info_nce(view1, view2, negatives, temperature).item()
    assert loss[present].mean().item() == pytest.approx(expected, abs=1e-12)


def test_fake_supcon_of_a_single_fake_is_zero() -> None:
    fake, view1, view2 = sample_embeddings(3, 1, 6)
    assert fake_supcon([fake], view1, view2, torch.tensor([True]), 0.1).tolist() == [0.0]


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
