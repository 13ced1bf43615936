"""The losses of the pair score; a step's in test_gan.py."""

import math

import torch

from cl_ray.losses.pairwise import pair_classification, pair_confusion


def test_known_values_of_the_losses() -> None:
    margin = torch.tensor([0.0, 1.0, -1.0, 800.0, -800.0], dtype=torch.float64)
    log2, up, down = math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(1))
    wanted = torch.tensor([log2, up, down, 0.0, 800.0], dtype=torch.float64)
    assert torch.allclose(pair_classification(margin), wanted, rtol=0, atol=1e-12)
    half = (up + down) / 2
    wanted = torch.tensor([log2, half, half, 400.0, 400.0], dtype=torch.float64)
    assert torch.allclose(pair_confusion(margin), wanted, rtol=0, atol=1e-12)
