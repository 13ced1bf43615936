"""The device, precision and CPU cores that a process computes with."""

import ctypes
import os
import platform

import torch

from cl_ray.errors import UserError

_DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}


def resolve_device(
    device: str = "auto", precision: str = "auto", gpus: float | None = None
) -> tuple[torch.device, torch.dtype]:
    """Return the device and dtype that a config asks for, `auto` resolved for this process.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`.
        precision: `auto`, `float32`, `bfloat16` or `float64`; `auto` is bfloat16 where the
            processor multiplies in it, else float32.
        gpus: GPUs that Ray assigned to this process, fractions allowed. None for a process that
            Ray did not start, which may use every GPU that it sees. Ray leaves GPUs visible to
            processes without one (2.60, https://github.com/ray-project/ray/issues/54868).

    Raises:
        UserError: This process does not have that device.
    """
    selected = select_device(device, gpus is None or gpus > 0)
    if precision == "auto":
        precision = "bfloat16" if has_fast_bfloat16(selected.type) else "float32"
    return selected, _DTYPES[precision]


def select_device(device: str, gpus: bool = True) -> torch.device:
    """Return the device of that name; for `auto` the fastest that there is.

    Args:
        device: `auto`, `cpu`, `cuda` or `mps`.
        gpus: Whether this process may use the CUDA devices that it sees.

    Raises:
        UserError: The name is unknown, or this process does not have that device.
    """
    available = {
        "cuda": gpus and torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if device == "auto":
        device = next(kind for kind, there in available.items() if there)
    if device not in available:
        raise UserError(f"device {device!r} is unknown; there are: auto, {', '.join(available)}.")
    if not available[device]:
        raise UserError(f"device {device!r} is not available to this process: use auto or cpu.")
    if device == "cuda":  # by default, convolutions of float32 round to TF32's 10 bits
        torch.backends.cudnn.allow_tf32 = False
    return torch.device(device)


def has_fast_bfloat16(kind: str) -> bool:
    """Return whether a `cuda` or `cpu` device multiplies bfloat16 natively, without emulation."""
    if kind == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if kind == "cpu":
        able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
        return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
    return False


def describe_device(device: torch.device, dtype: torch.dtype) -> str:
    """Return device, threads and precision as text, such as `cpu, 2 threads, float32`."""
    precision = "bfloat16 autocast" if dtype == torch.bfloat16 else str(dtype).split(".")[1]
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {precision}"
    return f"{device.type}, {torch.get_num_threads()} threads, {precision}"


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for later ones.

    By default glibc returns each freed activation to the kernel, which clears the pages again for
    the next one: that took a third of a training step on the CPU.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


class CpuAffinity:
    """Binds each CPU thread of torch to a core of its own while the context is entered.

    The threads wait for each other thousands of times a step. Beside a busy program Linux still
    puts two of them on one core, which makes a step tens of times slower (benchmarks/README.md,
    "Beside another program"). Threads that are fewer or more than the cores are not bound.

    OMP_PROC_BIND does not do: it is read when a process starts, it binds two workers of one thread
    each to the same core 0, and every thread that the training thread starts to its one core.

    Args:
        threads: Number of CPU threads. Build it in the thread that enters, before that thread
            computes: its first computation starts the others.
    """

    def __init__(self, threads: int):
        torch.set_num_threads(threads)
        self._cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        helpers = _start_thread_pool(threads) if 1 < threads == len(self._cores) else []
        self._bound = len(helpers) == threads - 1 > 0
        if self._bound:
            try:
                for helper, core in zip(helpers, self._cores[1:], strict=True):
                    os.sched_setaffinity(helper, [core])
            except OSError:  # forbidden by a sandbox
                self._bound = False

    def __enter__(self) -> None:
        if self._bound:
            os.sched_setaffinity(0, self._cores[:1])

    def __exit__(self, *_: object) -> None:
        if self._bound:  # or threads that this one starts elsewhere would keep to its core
            os.sched_setaffinity(0, self._cores)


def thread_ids() -> set[int]:
    """Return the system's ids of the threads of this process."""
    return {int(number) for number in os.listdir("/proc/self/task")}


def _start_thread_pool(threads: int) -> list[int]:
    """Start the threads that this thread computes with; return their ids."""
    before = thread_ids()
    torch.ones(threads << 16).add_(1)  # torch gives each thread at least 32,768 numbers
    return sorted(thread_ids() - before)
