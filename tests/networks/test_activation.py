"""The output activation: its range, its gradient, and that black images are left again."""

import math

import pytest
import torch

from cl_ray.networks.activation import StretchedTanh


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_pixels_reach_the_ends_of_the_range_and_no_further(dtype: torch.dtype) -> None:
    x = torch.linspace(-6, 6, 101, dtype=dtype)
    pixels = StretchedTanh()(x)
    assert pixels.dtype == dtype
    expected = [max(-1.0, min(1.0, 1.1 * math.tanh(value))) for value in x.tolist()]
    assert pixels.tolist() == pytest.approx(expected, abs=4 * torch.finfo(dtype).eps)
    assert (pixels == -1).sum() == sum(value == -1 for value in expected) > 20
    assert pixels.min() == -pixels.max() == -1


def test_gradient_is_that_of_the_stretched_tanh() -> None:
    x = torch.linspace(-4, 4, 33, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(StretchedTanh()(x).sum(), x)
    expected = [1.1 * (1 - math.tanh(value) ** 2) for value in x.tolist()]
    assert gradient.tolist() == pytest.approx(expected, rel=1e-12)


def test_black_pixels_are_left_in_few_steps() -> None:
    """Unlike with tanh, after many steps towards black."""

    def steps_to_leave(layer: torch.nn.Module) -> int:
        x = torch.zeros((), requires_grad=True)
        optimizer = torch.optim.Adam([x], lr=0.01)
        for step in range(3000):
            target = -1.0 if step < 1000 else 1.0
            optimizer.zero_grad()
            (layer(x) - target).abs().backward()
            optimizer.step()
            if step >= 1000 and layer(x) > 0:
                return step - 1000
        return 2000

    ours, plain = steps_to_leave(StretchedTanh()), steps_to_leave(torch.nn.Tanh())
    assert ours < 400
    assert plain > 2 * ours
