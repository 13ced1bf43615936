"""The collective operations of training; without a process group each is the identity.

All ranks must call them in the same order. They sum over ranks and do not average: losses are local
sums divided by a global count, so that N workers take the same step as one.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

SAME_LOSS_PAIRS = 512
"""Largest global batch of which every rank computes all losses on gathered vectors."""


def in_process_group() -> bool:
    """Whether this process is in a group, of one process or more."""
    return dist.is_available() and dist.is_initialized()


def world() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a process group."""
    return (dist.get_rank(), dist.get_world_size()) if in_process_group() else (0, 1)


def can_capture() -> bool:
    """Whether CUDA graphs can capture the operations on a GPU: NCCL's, but not gloo's."""
    return not in_process_group() or "cuda:nccl" in dist.get_backend_config()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum `value` over ranks, without gradient; its shape is the same on all ranks."""
    if not in_process_group():
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total


def sum_gradients(gradients: Sequence[Tensor]) -> Sequence[Tensor]:
    """Sum each gradient over ranks, by one all-reduce of all of them."""
    if not in_process_group():
        return gradients
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    parts = flat.split([g.numel() for g in gradients])
    return [part.view(g.shape) for part, g in zip(parts, gradients, strict=True)]


def loss_rows(pairs: int) -> slice:
    """Return for which pairs of a global batch this rank computes losses on gathered vectors.

    For all of a small batch, which saves a sum over ranks in each backward pass (see `gather`); for
    its own pairs of a larger one, since time and memory of all grow with the square of the batch.
    """
    rank, workers = world()
    if pairs <= SAME_LOSS_PAIRS:
        return slice(0, pairs)
    return slice(rank * pairs // workers, (rank + 1) * pairs // workers)


class _Gather(torch.autograd.Function):
    """One all-gather of several tensors."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, *parts: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)  # each network's backward pass needs only its own parts
        rows = torch.cat([part.transpose(0, 1).flatten(1) for part in parts], 1)
        size = world()[1]
        pairs = size * len(rows)
        ctx.same_loss = loss_rows(pairs) == slice(0, pairs)  # type: ignore[attr-defined]
        gathered = rows.new_empty(pairs, rows.shape[1])
        dist.all_gather(list(gathered.chunk(size)), rows)
        split = gathered.split([part[:, 0].numel() for part in parts], 1)
        shapes = [(part.shape[0], part.shape[2]) for part in parts]
        return tuple(
            columns.unflatten(1, shape).transpose(0, 1).contiguous()
            for columns, shape in zip(split, shapes, strict=True)
        )

    @staticmethod
    @once_differentiable
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        rank, size = world()
        same_loss = ctx.same_loss  # type: ignore[attr-defined]
        totals = [
            g if g is None or same_loss else sum_over_ranks(g.contiguous()) for g in gradients
        ]
        factor = size if same_loss else 1
        return tuple(g if g is None else factor * g.chunk(size, 1)[rank] for g in totals)


def gather(vectors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gather vectors [k, b, d] of all N ranks to [k, N b, d], rank by rank, by one all-gather.

    The gradient by this rank's vectors v is that of the sum of all ranks' losses, sum_r dL_r/dv.
    If each of them computes the loss L of all pairs, L_r = L/N, it is N times that of its own L/N,
    without communication. If each computes the losses of its `loss_rows`, it is a sum over ranks.

    Args:
        vectors: By name; k and d may differ. All have the same type, and b is equal on all ranks.
    """
    if not in_process_group():
        return dict(vectors)
    return dict(zip(vectors, _Gather.apply(*vectors.values()), strict=True))


def broadcast(tensors: Sequence[Tensor]) -> None:
    """Overwrite every tensor by that of rank 0, in place."""
    if in_process_group():
        for tensor in tensors:
            dist.broadcast(tensor.detach(), src=0)  # the same memory, without autograd
