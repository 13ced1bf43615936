"""Memory and CPUs of this process, and versions of packages."""

import ctypes
import importlib.metadata
import os
import platform
import resource


def peak_memory() -> int:
    """Return the peak resident memory of this process in bytes."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def return_freed_memory() -> None:
    """Have glibc return the memory of large arrays to the system as soon as they are freed.

    By default every thread that has decoded an image keeps tens of megabytes.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # M_MMAP_THRESHOLD


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use: a batch system grants some of them."""
    allowed = getattr(os, "sched_getaffinity", None)  # Linux
    return len(allowed(0)) if allowed else os.cpu_count() or 1


def package_version(package: str, default: str = "source") -> str:
    """Return the version of a package; `default` if it is not installed.

    A job that ships its working directory has only the source of cl_ray.
    """
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return default
