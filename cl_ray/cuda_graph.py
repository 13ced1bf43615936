"""A step as one CUDA graph: recorded once, then replayed on other inputs.

A step of small networks is some 900 kernels of 3 microseconds; to launch them one by one takes a
CPU core ten times as long as the GPU takes to run them (benchmarks/README.md, "On a GPU").
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

WARMUP_CALLS = 3
"""Calls that run as they are: libraries and optimisers allocate what they keep in their first."""


class GraphedStep:
    """A function that is recorded on a GPU, one recording for each set of shapes.

    Args:
        function: Takes tensors in tuples and lists, None among them; returns scalars by name. All
            else that it reads must lie where it lay and is changed in place, it must not wait for
            the GPU nor copy to it, and what it returns must not be differentiated.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]]):
        self.function = function
        self.calls: dict[tuple[torch.Size, ...], int] = {}
        self.recordings: dict[tuple[torch.Size, ...], CapturedGraph] = {}

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """What the function returns of these inputs."""
        shapes = tuple(tensor.shape for tensor in flatten_tensors(inputs))
        if shapes not in self.recordings:
            self.calls[shapes] = self.calls.get(shapes, 0) + 1
            if self.calls[shapes] <= WARMUP_CALLS:
                return self.function(*inputs)
            self.recordings[shapes] = CapturedGraph(self.function, inputs)
        return self.recordings[shapes](inputs)


class CapturedGraph:
    """One recording: the inputs' places, the graph and the outputs' places."""

    def __init__(self, function: Callable[..., dict[str, Tensor]], inputs: tuple[Any, ...]):
        self.inputs = clone_tensors(inputs)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: only this one's mistakes are errors.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            found = function(*self.inputs)
            self.names, self.values = list(found), torch.stack(list(found.values()))

    def __call__(self, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """Replay."""
        torch._foreach_copy_(list(flatten_tensors(self.inputs)), list(flatten_tensors(inputs)))
        self.graph.replay()
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))


def flatten_tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of nested tuples and lists, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif tree is not None:
        for part in tree:
            yield from flatten_tensors(part)


def clone_tensors(tree: Any) -> Any:
    """The same nested tuples and lists of copied tensors."""
    if isinstance(tree, Tensor):
        return tree.clone()
    if tree is None:
        return None
    parts = [clone_tensors(part) for part in tree]
    return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)


def set_lr(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of an optimiser's group, in place where a recorded step reads it."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
