"""The few collective operations of training, each of which also works with no process group.

Every rank calls each of them equally often and in the same order. Sums, not means, go over the
ranks: losses are local sums over a global count, so that N workers take the step of one.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world() -> tuple[int, int]:
    """This process's rank and the number of processes; (0, 1) when undistributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of every rank's `value`, outside autograd; the same shape on every rank."""
    if world()[1] == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def sum_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Each gradient summed over ranks by one flat all-reduce."""
    if world()[1] == 1:
        return gradients
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    return [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]


class _Gather(torch.autograd.Function):
    """Rows of all ranks; the gradient of a row is what all ranks' losses say of it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        rank, size = world()
        ctx.rows = slice(rank * len(rows), (rank + 1) * len(rows))  # type: ignore[attr-defined]
        parts = [torch.empty_like(rows) for _ in range(size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable  # the all-reduce has no gradient: a penalty on one would be wrong
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # others may hold it
        dist.all_reduce(total)
        return total[ctx.rows]  # type: ignore[attr-defined]


def gather(rows: Tensor) -> Tensor:
    """Rows [b, ...] of every rank as [N b, ...], rank by rank, with gradient through all of them.

    Every rank gives equally many rows.
    """
    return rows if world()[1] == 1 else _Gather.apply(rows)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite every tensor by rank 0's, in place."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)  # the same memory, outside autograd
