"""The collective operations of training; each also works without a process group.

All ranks must call them in the same order. They sum over ranks and do not average: losses are local
sums divided by a global count, so that N workers take the same step as one.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum `value` over ranks, without gradient; its shape is the same on all ranks."""
    if world()[1] == 1:
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def sum_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sum each gradient over ranks, by one all-reduce of all of them."""
    if world()[1] == 1:
        return gradients
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    return [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]


class _Gather(torch.autograd.Function):
    """All-gather whose backward pass sums the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        rank, size = world()
        ctx.rows = slice(rank * len(rows), (rank + 1) * len(rows))  # type: ignore[attr-defined]
        parts = [torch.empty_like(rows) for _ in range(size)]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    @once_differentiable  # the all-reduce is not differentiable
    def backward(ctx: torch.autograd.function.FunctionCtx, gradient: Tensor) -> Tensor:
        total = gradient.clone(memory_format=torch.contiguous_format)  # autograd may share it
        dist.all_reduce(total)
        return total[ctx.rows]  # type: ignore[attr-defined]


def gather(rows: Tensor) -> Tensor:
    """Gather rows [b, ...] of all N ranks to [N b, ...], rank by rank, differentiably.

    b is the same on all ranks.
    """
    return rows if world()[1] == 1 else _Gather.apply(rows)


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite every tensor by that of rank 0, in place."""
    if world()[1] > 1:
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)  # the same memory, without autograd
