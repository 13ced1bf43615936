"""Parts of the convolutional family."""

import pytest
import torch
from torch import nn

from cl_ray.networks.convolutional import CellConvTranspose, ImageConv

DOUBLE = torch.float64


@pytest.mark.parametrize("side", [28, 29, 31, 64])
@pytest.mark.parametrize("channels", [1, 3])
def test_image_convolution_equals_conv2d(side: int, channels: int) -> None:
    torch.manual_seed(0)
    conv = ImageConv(channels, 5).double()
    given = torch.rand(3, channels, side, side, dtype=DOUBLE).requires_grad_()
    ours = conv(given)
    theirs = nn.functional.conv2d(given, conv.weight, conv.bias, stride=2, padding=1)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert conv.bias is not None
    inputs = (given, conv.weight, conv.bias)
    for one, other in zip(
        torch.autograd.grad(ours.sin().sum(), inputs),
        torch.autograd.grad(theirs.sin().sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize(("side", "odd"), [(3, 1), (7, 0)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_transposed_convolution_by_cells_is_the_plain_one(
    side: int, odd: int, layout: torch.memory_format
) -> None:
    cells = CellConvTranspose(5, 3, odd).double().to(memory_format=layout)
    plain = nn.ConvTranspose2d(5, 3, 4, stride=2, padding=1, output_padding=odd).double()
    plain.load_state_dict(cells.state_dict())
    x = torch.randn(4, 5, side, side, dtype=DOUBLE).to(memory_format=layout)
    ours, theirs = cells(x), plain(x)
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn_like(theirs)
    for mine, its in zip(
        torch.autograd.grad((ours * weights).sum(), list(cells.parameters())),
        torch.autograd.grad((theirs * weights).sum(), list(plain.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(mine, its)
