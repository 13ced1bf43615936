"""Tests of the optimizer Muon."""

import pytest
import torch
from helpers.naive_gan import newton_schulz
from torch import nn

from cl_ray.muon import BLOCK_SIDE, Muon, orthogonalize


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def test_orthogonalize_equals_the_iteration_on_each_whole_matrix() -> None:
    shapes = [(20, 70), (16, 16), (70, 20), (1, 9), (20, 20)]
    matrices = [1e-3 * torch.randn(shape, dtype=torch.float64) for shape in shapes]
    for result, matrix in zip(orthogonalize(matrices), matrices, strict=True):
        torch.testing.assert_close(result, newton_schulz(matrix), rtol=0, atol=1e-10)


def test_orthogonalize_cuts_large_matrices_to_blocks() -> None:
    matrix = torch.randn(3 * BLOCK_SIDE - 3, 500, dtype=torch.float64)
    blocks = torch.cat([newton_schulz(block) for block in matrix.split(BLOCK_SIDE - 1)])
    wide, tall = orthogonalize([matrix, matrix.T])
    torch.testing.assert_close(wide, blocks, rtol=0, atol=1e-10)
    torch.testing.assert_close(tall, blocks.T, rtol=0, atol=1e-10)


def test_orthogonalize_sets_singular_values_to_about_one() -> None:
    left, _ = torch.linalg.qr(torch.randn(64, 64))
    right, _ = torch.linalg.qr(torch.randn(200, 64))
    matrix = left @ torch.diag(torch.logspace(0, -2, 64)) @ right.T
    values = torch.linalg.svdvals(*orthogonalize([matrix]))
    assert values.min() > 0.65
    assert values.max() < 1.25


def test_orthogonalize_keeps_zeros() -> None:
    one_row, rounding_errors = torch.zeros(16, 20), 1e-15 * torch.randn(16, 20)
    one_row[3] = torch.randn(20)
    zeros, one_row, small = orthogonalize([torch.zeros(16, 20), one_row, rounding_errors])
    assert not zeros.any()
    assert one_row[[*range(3), *range(4, 16)]].abs().max() == 0
    assert small.abs().max() < 1e-3


def test_step_is_nesterov_momentum_of_kernels_as_matrices() -> None:
    weight = nn.Parameter(torch.randn(16, 4, 4, 4, dtype=torch.float64))
    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
    expected, momentum = weight.detach().clone(), torch.zeros(16, 64, dtype=torch.float64)
    optimizer = Muon([weight], lr=0.01, momentum=0.6, weight_decay=0.2)
    for _ in range(3):
        weight.grad = torch.randn_like(weight)
        gradient = weight.grad.reshape(16, 64)
        momentum = 0.6 * momentum + 0.4 * gradient
        update = newton_schulz(0.4 * gradient + 0.6 * momentum)
        expected -= 0.01 * (64**0.5 * update.reshape(expected.shape) + 0.2 * expected)
        optimizer.step()
        torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=1e-12)


def test_an_update_is_as_large_as_adams() -> None:
    weight = nn.Parameter(torch.zeros(32, 8, 4, 4))
    weight.grad = torch.randn_like(weight)
    Muon([weight], lr=0.01, momentum=0.5).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.01, rel=0.25)
