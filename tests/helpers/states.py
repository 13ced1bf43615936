"""Copy states as a checkpoint does, and compare them bit for bit."""

import io
from typing import Any

import torch
from torch import Tensor


def pack(state: dict[str, Any]) -> bytes:
    """Serialize a state, so that later steps cannot change it."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpack(packed: bytes) -> dict[str, Any]:
    return torch.load(io.BytesIO(packed), weights_only=True)


def states_equal(ours: Any, theirs: Any) -> bool:
    """Return whether two states are equal, every tensor to its last bit."""
    if isinstance(ours, Tensor):
        return ours.dtype == theirs.dtype and torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(states_equal(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list | tuple):
        return len(ours) == len(theirs) and all(map(states_equal, ours, theirs))
    return ours == theirs
