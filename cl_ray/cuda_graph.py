"""Run a training step as one CUDA graph: captured once, then replayed on new inputs.

A step of small networks launches about 900 kernels of 3 microseconds; launching them one by one
takes a CPU core ten times as long as the GPU takes to run them (benchmarks/README.md, "On a GPU").

NCCL's collective operations are captured with the rest. All ranks must then capture and replay the
same calls in the same order, which they do, since a call is told by its shapes; and a communicator
cannot be destroyed before the graphs that use it (`release_graphs`).
"""

from collections.abc import Callable
from threading import Lock
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

WARMUP_CALLS = 3
"""Eager calls before the capture: libraries, optimizers and NCCL's communicators allocate their
state in the first."""
_graphed_steps: "WeakSet[GraphedStep]" = WeakSet()


class Graph(Protocol):
    """The part of `torch.cuda.CUDAGraph` that is used."""

    def replay(self) -> None:
        """Compute again what was captured."""

    def reset(self) -> None:
        """Free the graph."""


Recorder = Callable[[Callable[[], Tensor]], tuple[Graph, Tensor]]
"""Captures a call; returns the graph and the result, which each replay overwrites."""


def record_cuda_graph(function: Callable[[], Tensor]) -> tuple[Graph, Tensor]:
    """Capture a call in a CUDA graph, without running its kernels."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may use the GPU meanwhile, as NCCL's watchdog does: only errors of this thread
    # end the capture.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        return graph, function()


def release_graphs() -> None:
    """Free all graphs of this process; to be called before its process group is destroyed.

    NCCL waits for them: `destroy_process_group` would not return.
    """
    for step in list(_graphed_steps):
        step.reset()


class GraphedStep:
    """Captures a function in one CUDA graph for each set of input shapes.

    Args:
        function: Takes nested tuples and lists of tensors and None, and returns scalars by name.
            All other state must keep its place in memory and be changed in place. The function
            must not synchronize with the GPU or copy from the host, and its results must not
            require gradients.
        enabled: False: compute every call eagerly.
        record: Captures a call.
    """

    def __init__(
        self,
        function: Callable[..., dict[str, Tensor]],
        enabled: bool,
        record: Recorder = record_cuda_graph,
    ):
        self.function, self.enabled, self.record = function, enabled, record
        self.calls: dict[tuple[torch.Size, ...], int] = {}
        self.graphs: dict[tuple[torch.Size, ...], CapturedGraph] = {}
        self.lock = Lock()  # `release_graphs` may be called by another thread
        _graphed_steps.add(self)

    def reset(self) -> None:
        """Free all graphs, as when memory that they read was replaced."""
        with self.lock:
            for captured in self.graphs.values():
                captured.graph.reset()  # now: NCCL would wait for the garbage collector
            self.calls, self.graphs = {}, {}

    def __call__(self, *inputs: Any) -> dict[str, Tensor]:
        """Compute the function, eagerly in the first WARMUP_CALLS calls with these shapes."""
        if not self.enabled:
            return self.function(*inputs)
        shapes = tuple(tensor.shape for tensor in flatten_tensors(inputs))
        self.calls[shapes] = self.calls.get(shapes, 0) + 1
        if self.calls[shapes] <= WARMUP_CALLS:
            return self.function(*inputs)
        with self.lock:
            if shapes not in self.graphs:
                self.graphs[shapes] = CapturedGraph(self.function, inputs, self.record)
            return self.graphs[shapes](inputs)


class CapturedGraph:
    """One captured call: static inputs, the graph, and static outputs."""

    def __init__(
        self,
        function: Callable[..., dict[str, Tensor]],
        inputs: tuple[Any, ...],
        record: Recorder,
    ):
        self.inputs = map_tensors(torch.clone, inputs)
        self.names: list[str] = []

        def compute() -> Tensor:
            outputs = function(*self.inputs)
            self.names = list(outputs)
            return torch.stack(list(outputs.values()))

        self.graph, self.values = record(compute)

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
