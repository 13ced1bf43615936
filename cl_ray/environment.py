"""What this process took, and which versions it runs."""

import importlib.metadata
import platform
import resource


def peak_memory() -> int:
    """Bytes that this process held at its peak."""
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def package_version(package: str) -> str:
    """The version of an installed package; `source` where only its source is there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "source"  # as in a job that ships its working folder
