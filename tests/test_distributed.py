"""Collective operations over real processes, and without a process group, against plain sums."""

import warnings
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from torch import Tensor, nn

from cl_ray import distributed

LOCAL = 3
"""Rows of each rank."""


def rows_of(rank: int) -> Tensor:
    """Return a rank's rows [LOCAL, 2, 2]; all rows of all ranks differ."""
    return torch.arange(LOCAL * 4, dtype=torch.float64).view(LOCAL, 2, 2) / 7 + rank


def loss_of(rank: int, all_rows: Tensor) -> Tensor:
    """Return a nonlinear loss of all rows that differs between ranks."""
    weight = torch.arange(all_rows.numel(), dtype=torch.float64).view_as(all_rows) + 10 * rank
    return (all_rows.sin() * weight.cos()).sum()


def tensors_of(rank: int) -> list[Tensor]:
    """Return tensors of several shapes, one of them channels-last."""
    shapes = [(), (3,), (2, 3, 4, 5), (1, 1)]
    tensors = [torch.full(shape, 10.0**rank) for shape in shapes]
    tensors[2] *= torch.arange(120).view(2, 3, 4, 5)
    tensors[2] = tensors[2].contiguous(memory_format=torch.channels_last)
    return tensors


def observe() -> dict[str, Any]:
    """Return this rank's results of each operation."""
    rank, workers = distributed.world()
    result: dict[str, Any] = {"world": (rank, workers)}

    rows = rows_of(rank).requires_grad_()
    result["gathered"] = distributed.gather(rows).detach()
    result["gradient"] = torch.autograd.grad(loss_of(rank, distributed.gather(rows)), rows)[0]
    transposed = rows.transpose(1, 2)  # not contiguous
    all_rows = distributed.gather(transposed).transpose(1, 2)
    result["gradient transposed"] = torch.autograd.grad(loss_of(rank, all_rows), rows)[0]
    own = torch.zeros(workers * LOCAL, 2, 2, dtype=torch.float64, requires_grad=True)
    total = distributed.gather(rows) + own
    result["gradients of a sum"] = torch.autograd.grad(loss_of(rank, total), [rows, own])
    result["flags"] = distributed.gather(torch.arange(LOCAL) == rank)
    result["flat"] = distributed.gather(torch.tensor([float(rank)]))

    gradients = tensors_of(rank)
    result["gradients"] = list(distributed.sum_gradients(gradients))
    result["gradients given"] = gradients

    value = torch.tensor([1.0, 2.0], requires_grad=True)
    result["sum"] = distributed.sum_over_ranks(value * (rank + 1))
    result["count"] = distributed.sum_over_ranks(torch.tensor(rank + 5))
    result["value given"] = value.detach()

    weights = [nn.Parameter(tensor) for tensor in tensors_of(rank)]
    where = [weight.data_ptr() for weight in weights]
    distributed.broadcast(weights)
    result["in place"] = where == [weight.data_ptr() for weight in weights]
    result["weights"] = [weight.detach() for weight in weights]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # autograd would warn of a broadcast that it sees
        loss = torch.stack([weight.sum() for weight in weights]).sum()
        result["weights' gradients"] = torch.autograd.grad(loss, weights)
    return result


@pytest.fixture(scope="module", params=["no group", "1 rank", "2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if request.param == "no group":
        return [observe()]
    return run_on_ranks(observe, int(request.param[0]))


def test_world(ranks: list[dict[str, Any]]) -> None:
    assert [result["world"] for result in ranks] == [
        (rank, len(ranks)) for rank in range(len(ranks))
    ]


def test_gather_concatenates_the_ranks(ranks: list[dict[str, Any]]) -> None:
    all_rows = torch.cat([rows_of(rank) for rank in range(len(ranks))])
    flags = torch.cat([torch.arange(LOCAL) == rank for rank in range(len(ranks))])
    for result in ranks:
        assert torch.equal(result["gathered"], all_rows)
        assert torch.equal(result["flags"], flags)
        assert result["flat"].tolist() == list(range(len(ranks)))


def test_gather_sums_the_gradients_of_all_losses(ranks: list[dict[str, Any]]) -> None:
    all_rows = torch.cat([rows_of(rank) for rank in range(len(ranks))]).requires_grad_()
    total = torch.stack([loss_of(rank, all_rows) for rank in range(len(ranks))]).sum()
    (gradient,) = torch.autograd.grad(total, all_rows)
    for result, expected in zip(ranks, gradient.split(LOCAL), strict=True):
        assert torch.allclose(result["gradient"], expected, rtol=0, atol=1e-14)
        assert torch.allclose(result["gradient transposed"], expected, rtol=0, atol=1e-14)


def test_gather_leaves_a_shared_gradient_unchanged(ranks: list[dict[str, Any]]) -> None:
    """Autograd passes one gradient tensor to both terms of a sum."""
    all_rows = torch.cat([rows_of(rank) for rank in range(len(ranks))]).requires_grad_()
    for rank, result in enumerate(ranks):
        of_rows, of_own = result["gradients of a sum"]
        (expected,) = torch.autograd.grad(loss_of(rank, all_rows), all_rows)
        assert torch.allclose(of_rows, result["gradient"], rtol=0, atol=1e-14)
        assert torch.allclose(of_own, expected, rtol=0, atol=1e-14)


def test_sum_gradients_keeps_shapes_and_inputs(ranks: list[dict[str, Any]]) -> None:
    of_ranks = [tensors_of(rank) for rank in range(len(ranks))]
    expected = [torch.stack(tensors).sum(0) for tensors in zip(*of_ranks, strict=True)]
    for rank, result in enumerate(ranks):
        for given, before, ours, right in zip(
            result["gradients given"], tensors_of(rank), result["gradients"], expected, strict=True
        ):
            assert ours.shape == right.shape
            assert torch.equal(ours, right)
            assert torch.equal(given, before)


def test_sum_over_ranks_has_no_gradient(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        expected = sum(range(1, len(ranks) + 1))
        assert result["sum"].tolist() == [expected, 2 * expected]
        assert not result["sum"].requires_grad
        assert result["count"].item() == sum(rank + 5 for rank in range(len(ranks)))
        assert result["value given"].tolist() == [1, 2]


def test_broadcast_overwrites_in_place(ranks: list[dict[str, Any]]) -> None:
    for result in ranks:
        assert result["in place"]
        for weight, first, gradient in zip(
            result["weights"], tensors_of(0), result["weights' gradients"], strict=True
        ):
            assert torch.equal(weight, first)
            assert (gradient == 1).all()
