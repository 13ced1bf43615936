"""The collectives over real processes against the same sums in one, and with no group at all."""

import warnings
from typing import Any

import pytest
import torch
from helpers.ranks import together
from torch import Tensor, nn

from cl_ray import distributed

LOCAL = 3
"""Rows of each rank."""


def rows_of(rank: int) -> Tensor:
    """A rank's rows [LOCAL, 2, 2], no two alike over all ranks."""
    return torch.arange(LOCAL * 4, dtype=torch.float64).view(LOCAL, 2, 2) / 7 + rank


def loss_of(rank: int, everyone: Tensor) -> Tensor:
    """Each rank weighs all rows in a way of its own, and not linearly."""
    weight = torch.arange(everyone.numel(), dtype=torch.float64).view_as(everyone) + 10 * rank
    return (everyone.sin() * weight.cos()).sum()


def tensors_of(rank: int) -> list[Tensor]:
    """Of several shapes, one of them with its channels last in memory."""
    shapes = [(), (3,), (2, 3, 4, 5), (1, 1)]
    made = [torch.full(shape, 10.0**rank) for shape in shapes]
    made[2] *= torch.arange(120).view(2, 3, 4, 5)
    made[2] = made[2].contiguous(memory_format=torch.channels_last)
    return made


def observe() -> dict[str, Any]:
    """What this rank gets from each operation."""
    rank, workers = distributed.world()
    seen: dict[str, Any] = {"world": (rank, workers)}

    rows = rows_of(rank).requires_grad_()
    seen["gathered"] = distributed.gather(rows).detach()
    seen["gradient"] = torch.autograd.grad(loss_of(rank, distributed.gather(rows)), rows)[0]
    aslant = rows.transpose(1, 2)  # does not lie in memory as it is read
    everyone = distributed.gather(aslant).transpose(1, 2)
    seen["gradient aslant"] = torch.autograd.grad(loss_of(rank, everyone), rows)[0]
    own = torch.zeros(workers * LOCAL, 2, 2, dtype=torch.float64, requires_grad=True)
    beside = distributed.gather(rows) + own
    seen["gradient beside"] = torch.autograd.grad(loss_of(rank, beside), [rows, own])
    seen["flags"] = distributed.gather(torch.arange(LOCAL) == rank)
    seen["flat"] = distributed.gather(torch.tensor([float(rank)]))

    gradients = tensors_of(rank)
    seen["gradients"] = list(distributed.sum_gradients(gradients))
    seen["gradients given"] = gradients

    value = torch.tensor([1.0, 2.0], requires_grad=True)
    seen["sum"] = distributed.sum_over_ranks(value * (rank + 1))
    seen["count"] = distributed.sum_over_ranks(torch.tensor(rank + 5))
    seen["value given"] = value.detach()

    weights = [nn.Parameter(tensor) for tensor in tensors_of(rank)]
    where = [weight.data_ptr() for weight in weights]
    distributed.broadcast(weights)
    seen["in place"] = where == [weight.data_ptr() for weight in weights]
    seen["weights"] = [weight.detach() for weight in weights]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a broadcast that autograd sees is warned of here
        loss = torch.stack([weight.sum() for weight in weights]).sum()
        seen["weights' gradients"] = torch.autograd.grad(loss, weights)
    return seen


@pytest.fixture(scope="module", params=["no group", "1 rank", "2 ranks", "3 ranks"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if request.param == "no group":
        return [observe()]
    return together(observe, int(request.param[0]))


def test_world(ranks: list[dict[str, Any]]) -> None:
    assert [seen["world"] for seen in ranks] == [(rank, len(ranks)) for rank in range(len(ranks))]


def test_gather_is_all_rows_rank_by_rank(ranks: list[dict[str, Any]]) -> None:
    everyone = torch.cat([rows_of(rank) for rank in range(len(ranks))])
    flags = torch.cat([torch.arange(LOCAL) == rank for rank in range(len(ranks))])
    for seen in ranks:
        assert torch.equal(seen["gathered"], everyone)
        assert torch.equal(seen["flags"], flags)
        assert seen["flat"].tolist() == list(range(len(ranks)))


def test_the_gradient_of_a_row_is_what_all_losses_say(ranks: list[dict[str, Any]]) -> None:
    everyone = torch.cat([rows_of(rank) for rank in range(len(ranks))]).requires_grad_()
    total = torch.stack([loss_of(rank, everyone) for rank in range(len(ranks))]).sum()
    (gradient,) = torch.autograd.grad(total, everyone)
    for seen, expected in zip(ranks, gradient.split(LOCAL), strict=True):
        assert torch.allclose(seen["gradient"], expected, rtol=0, atol=1e-14)
        assert torch.allclose(seen["gradient aslant"], expected, rtol=0, atol=1e-14)


def test_what_stands_beside_a_gather_keeps_its_own_gradient(ranks: list[dict[str, Any]]) -> None:
    """Autograd hands one gradient to both sides of a sum: the gather must not write in it."""
    everyone = torch.cat([rows_of(rank) for rank in range(len(ranks))]).requires_grad_()
    for rank, seen in enumerate(ranks):
        of_rows, of_own = seen["gradient beside"]
        (expected,) = torch.autograd.grad(loss_of(rank, everyone), everyone)
        assert torch.allclose(of_rows, seen["gradient"], rtol=0, atol=1e-14)
        assert torch.allclose(of_own, expected, rtol=0, atol=1e-14)


def test_gradients_are_summed_each_in_its_shape(ranks: list[dict[str, Any]]) -> None:
    of_ranks = [tensors_of(rank) for rank in range(len(ranks))]
    expected = [torch.stack(tensors).sum(0) for tensors in zip(*of_ranks, strict=True)]
    for rank, seen in enumerate(ranks):
        for given, before, ours, right in zip(
            seen["gradients given"], tensors_of(rank), seen["gradients"], expected, strict=True
        ):
            assert ours.shape == right.shape
            assert torch.equal(ours, right)
            assert torch.equal(given, before)


def test_sums_go_over_all_ranks_and_leave_autograd(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        everyones = sum(range(1, len(ranks) + 1))
        assert seen["sum"].tolist() == [everyones, 2 * everyones]
        assert not seen["sum"].requires_grad
        assert seen["count"].item() == sum(rank + 5 for rank in range(len(ranks)))
        assert seen["value given"].tolist() == [1, 2]


def test_broadcast_overwrites_by_rank_0_in_place(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert seen["in place"]
        for weight, first, gradient in zip(
            seen["weights"], tensors_of(0), seen["weights' gradients"], strict=True
        ):
            assert torch.equal(weight, first)
            assert (gradient == 1).all()
