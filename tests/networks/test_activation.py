"""The last layer of a generator: no pixel beyond black and white, and a way out of both."""

import math

import pytest
import torch

from cl_ray.networks.activation import StretchedTanh


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pixels_reach_black_and_white_and_no_further(dtype: torch.dtype) -> None:
    x = torch.linspace(-6, 6, 101, dtype=dtype)
    pixels = StretchedTanh()(x)
    assert pixels.dtype == dtype
    expected = [max(-1.0, min(1.0, 1.1 * math.tanh(value))) for value in x.tolist()]
    assert pixels.tolist() == pytest.approx(expected, abs=4 * torch.finfo(dtype).eps)
    assert (pixels == -1).sum() == sum(value == -1 for value in expected) > 20
    assert pixels.min() == -pixels.max() == -1


def test_the_slope_is_the_stretched_tanh_s_also_where_it_is_cut() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(StretchedTanh()(x).sum(), x)
    expected = [1.1 * (1 - math.tanh(value) ** 2) for value in x.tolist()]
    assert slope.tolist() == pytest.approx(expected, rel=1e-12)


def test_a_black_picture_is_left_again() -> None:
    """Steps that drove a pixel to black for long do not cost as many to drive it back."""

    def steps_to_leave(layer: torch.nn.Module) -> int:
        x = torch.zeros((), requires_grad=True)
        descent = torch.optim.Adam([x], lr=0.01)
        for step in range(3000):
            target = -1.0 if step < 1000 else 1.0
            descent.zero_grad()
            (layer(x) - target).abs().backward()
            descent.step()
            if step >= 1000 and layer(x) > 0:
                return step - 1000
        return 2000

    ours, plain = steps_to_leave(StretchedTanh()), steps_to_leave(torch.nn.Tanh())
    assert ours < 400
    assert plain > 2 * ours
