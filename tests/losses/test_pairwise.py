"""Reconstruction and the losses of the pair score against loops."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from cl_ray.losses.pairwise import pair_classification, pair_confusion, pair_margin, reconstruction


def unit(pairs: int, size: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(pairs, size, generator=random, dtype=torch.float64), dim=1)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


@pytest.mark.parametrize("shape", [(1, 1, 2, 2), (3, 1, 5, 5), (7, 3, 4, 4)])
def test_reconstruction_is_the_mean_absolute_difference(shape: tuple[int, ...]) -> None:
    random = torch.Generator().manual_seed(0)
    fakes, images = torch.rand(2, *shape, generator=random, dtype=torch.float64) * 2 - 1
    loss = reconstruction(fakes, images)
    assert loss.shape == shape[:1]
    for i in range(shape[0]):
        ours, theirs = fakes[i].flatten().tolist(), images[i].flatten().tolist()
        expected = sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours)
        assert loss[i].item() == pytest.approx(expected, abs=1e-12)
    assert (reconstruction(images, images) == 0).all()
    white = torch.ones(shape)
    assert (reconstruction(white, -white) == 2).all()


@pytest.mark.parametrize(
    ("pairs", "size", "temperature"), [(1, 2, 0.05), (4, 3, 0.2), (9, 64, 10.0)]
)
def test_margin_and_its_two_losses_equal_the_loop(
    pairs: int, size: int, temperature: float
) -> None:
    anchor, right, wrong = (unit(pairs, size, seed) for seed in range(3))
    margin = pair_margin(anchor, right, wrong, temperature)
    d_loss, g_loss = pair_classification(margin), pair_confusion(margin)
    assert margin.shape == d_loss.shape == g_loss.shape == (pairs,)
    for i in range(pairs):
        a, r, w = anchor[i].tolist(), right[i].tolist(), wrong[i].tolist()
        fit = sum(x * y for x, y in zip(a, r, strict=True)) / temperature
        misfit = sum(x * y for x, y in zip(a, w, strict=True)) / temperature
        assert margin[i].item() == pytest.approx(fit - misfit, abs=1e-12)
        # torch's softplus is linear beyond 20, with an error of exp(-20).
        exact = 1e-12 if abs(fit - misfit) < 19.9 else 1e-8
        chosen, rejected = log_sigmoid(fit - misfit), log_sigmoid(misfit - fit)
        assert d_loss[i].item() == pytest.approx(-chosen, abs=exact)
        assert g_loss[i].item() == pytest.approx(-(chosen + rejected) / 2, abs=exact)


def test_known_values_of_the_losses() -> None:
    margin = torch.tensor([0.0, 1.0, -1.0, 800.0, -800.0], dtype=torch.float64)
    log2, up, down = math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    wanted = torch.tensor([log2, up, down, 0.0, 800.0], dtype=torch.float64)
    assert torch.allclose(pair_classification(margin), wanted, rtol=0, atol=1e-12)
    half = (up + down) / 2
    wanted = torch.tensor([log2, half, half, 400.0, 400.0], dtype=torch.float64)
    assert torch.allclose(pair_confusion(margin), wanted, rtol=0, atol=1e-12)
