"""Run a training step as one CUDA graph: captured once, then replayed on new inputs.

A step of small networks launches about 900 kernels of 3 microseconds; launching them one by one
takes a CPU core ten times as long as the GPU takes to run them (benchmarks/README.md, "On a GPU").
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARMUP_CALLS = 3
"""Eager calls before the capture: libraries and optimizers allocate their state in the first."""


class GraphedStep:
    """Captures a function in one CUDA graph for each set of input shapes.

    Args:
        function: Takes nested tuples and lists of tensors and None, and returns scalars by name.
            All other state must keep its place in memory and be changed in place. The function
            must not synchronize with the GPU or copy from the host, and its results must not
            require gradients.
        enabled: False: compute every call eagerly.
    """

    def __init__(self, function: Callable[..., dict[str, Tensor]], enabled: bool):
        self.function, self.enabled = function, enabled
        self.reset()

    def reset(self) -> None:
        """Forget all graphs, when memory that they read was replaced."""
        self.calls: dict[tuple[torch.Size, ...], int] = {}
        self.graphs: dict[tuple[torch.Size, ...], CapturedGraph] = {}

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Compute the function, eagerly in the first WARMUP_CALLS calls with these shapes."""
        if not self.enabled:
            return self.function(*inputs)
        shapes = tuple(tensor.shape for tensor in flatten_tensors(inputs))
        if shapes not in self.graphs:
            self.calls[shapes] = self.calls.get(shapes, 0) + 1
            if self.calls[shapes] <= WARMUP_CALLS:
                return self.function(*inputs)
            self.graphs[shapes] = CapturedGraph(self.function, inputs)
        return self.graphs[shapes](inputs)


class CapturedGraph:
    """One captured call: static inputs, the graph, and static outputs."""

    def __init__(self, function: Callable[..., dict[str, Tensor]], inputs: tuple[Any, ...]):
        self.inputs = map_tensors(torch.clone, inputs)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile: only errors of this thread end the capture.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            outputs = function(*self.inputs)
            self.names, self.values = list(outputs), torch.stack(list(outputs.values()))

    def __call__(self, inputs: tuple[Any, ...]) -> dict[str, Tensor]:
        """Copy the inputs in, replay, and copy the outputs out."""
        torch._foreach_copy_(flatten_tensors(self.inputs), flatten_tensors(inputs))
        self.graph.replay()
        return dict(zip(self.names, self.values.clone().unbind(), strict=True))


def map_tensors(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to every tensor of nested tuples and lists; the rest stays as it is."""
    if isinstance(tree, Tensor):
        return function(tree)
    if not isinstance(tree, tuple | list):
        return tree
    items = [map_tensors(function, item) for item in tree]
    return tree._make(items) if hasattr(tree, "_make") else type(tree)(items)  # a NamedTuple


def flatten_tensors(tree: Any) -> list[Tensor]:
    """List the tensors of nested tuples and lists, in order."""
    tensors: list[Tensor] = []
    map_tensors(tensors.append, tree)
    return tensors
