"""What each worker computes on, resolved by the worker itself and printed."""

import ctypes
import platform

import torch

from cl_ray.config import Config
from cl_ray.errors import UserError

DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def resolve_device(config: Config, gpus: float | None = None) -> tuple[torch.device, torch.dtype]:
    """The device and precision that the config asks for, or the best there are for this process.

    Ray leaves a machine's GPUs visible to processes that were given none of them (2.60; see
    https://github.com/ray-project/ray/issues/54868), so being seen does not make one ours.

    Args:
        config: The run's.
        gpus: How many GPUs Ray gave this process, a part of one allowed; None is a process that
            is not Ray's, and may take what it sees.

    Raises:
        UserError: The config names a device that this process does not have.
    """
    device = select_device(config.device, gpus is None or gpus > 0)
    precision = config.precision
    if precision == "auto":
        precision = "bfloat16" if fast_bfloat16(device.type) else "float32"
    return device, DTYPES[precision]


def select_device(device: str, gpus: bool = True) -> torch.device:
    """The device of that name, or with `auto` the best there is.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`.
        gpus: Whether this process may use the CUDA devices that it sees.

    Raises:
        UserError: It is unknown, or this process does not have it.
    """
    there = {
        "cuda": gpus and torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(kind for kind, found in there.items() if found)
    if device not in there:
        raise UserError(f"device {device!r} is unknown; there are: auto, {', '.join(there)}.")
    if not there[device]:
        raise UserError(f"device {device!r} is not there for this process: use auto, or cpu.")
    return torch.device(device)


def fast_bfloat16(kind: str) -> bool:
    """Whether the processor multiplies in bfloat16 itself, rather than by emulation."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """The choice in words."""
    precision = "bfloat16 autocast" if dtype == torch.bfloat16 else str(dtype).split(".")[1]
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {precision}"
    return f"{device.type}, {torch.get_num_threads()} threads, {precision}"


def keep_freed_memory() -> None:
    """Let the C library keep the memory of freed tensors, on Linux.

    By default glibc gives each freed activation back to the kernel, which then clears its pages
    again for the next one: a third of a CPU step went there.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
