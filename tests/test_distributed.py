"""Collective operations over real processes, and without a process group, against plain sums."""

import math
import warnings
from typing import Any

import pytest
import torch
from helpers.ranks import run_on_ranks
from torch import Tensor, nn

from cl_ray import distributed

LOCAL = 3
"""Rows of each rank."""


def vectors_of(rank: int) -> dict[str, Tensor]:
    """Return a rank's vectors [k, LOCAL, d]; all of all ranks differ."""
    shapes = {"views": (2, LOCAL, 4), "latents": (1, LOCAL, 3)}
    return {
        name: torch.arange(math.prod(shape), dtype=torch.float64).view(shape) / 7 + rank
        for name, shape in shapes.items()
    }


def loss_of(gathered: dict[str, Tensor], name: str) -> Tensor:
    """Return a loss of all vectors of that name, in which each pair of rows meets."""
    rows = gathered[name].flatten(0, 1)
    return (rows @ rows.T).sin().sum()


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

    vectors = {name: value.requires_grad_() for name, value in vectors_of(rank).items()}
    gathered = distributed.gather({name: 1 * value for name, value in vectors.items()})
    result["gathered"] = {name: value.detach() for name, value in gathered.items()}
    # As in a step: a backward pass for each network, one after the other.
    result["gradients of parts"] = {
        name: torch.autograd.grad(loss_of(gathered, name) / workers, value)[0]
        for name, value in vectors.items()
    }
    transposed = vectors["views"].transpose(1, 2)  # not contiguous
    result["transposed"] = distributed.gather({"views": transposed})["views"].detach()

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


@pytest.fixture(scope="module", params=["no group", "1 rank", "3 ranks"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    if request.param == "no group":
        return [observe()]
    return run_on_ranks(observe, int(request.param[0]))


def test_world(ranks: list[dict[str, Any]]) -> None:
    assert [result["world"] for result in ranks] == [
        (rank, len(ranks)) for rank in range(len(ranks))
    ]


def of_all_ranks(count: int) -> dict[str, Tensor]:
    parts = [vectors_of(rank) for rank in range(count)]
    return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}


def test_gather_concatenates_the_ranks(ranks: list[dict[str, Any]]) -> None:
    expected = of_all_ranks(len(ranks))
    turned = torch.cat([vectors_of(r)["views"].transpose(1, 2) for r in range(len(ranks))], 1)
    for result in ranks:
        assert list(result["gathered"]) == list(expected)
        assert all(torch.equal(result["gathered"][name], expected[name]) for name in expected)
        assert torch.equal(result["transposed"], turned)


def test_parts_of_a_loss_of_all_vectors_have_its_gradient(ranks: list[dict[str, Any]]) -> None:
    whole = {name: value.requires_grad_() for name, value in of_all_ranks(len(ranks)).items()}
    for name, value in whole.items():
        (gradient,) = torch.autograd.grad(loss_of(whole, name), value)
        for result, expected in zip(ranks, gradient.split(LOCAL, 1), strict=True):
            ours = result["gradients of parts"][name]
            assert torch.allclose(ours, expected, rtol=1e-14, atol=1e-12)


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
