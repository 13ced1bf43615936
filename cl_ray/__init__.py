"""cl_ray: adversarial contrastive learning from images, on one laptop or a Ray cluster.

`from cl_ray import Config, train` does what `cl-ray train` does. A name is imported when it is
first used: `import cl_ray` itself needs neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_ray.adversary import Adversary, Batch
    from cl_ray.config import Config, preset
    from cl_ray.errors import UserError
    from cl_ray.loading import LoadedRun, load
    from cl_ray.training.train import Launch, Trained, train

__all__ = [
    "Adversary",
    "Batch",
    "Config",
    "Launch",
    "LoadedRun",
    "Trained",
    "UserError",
    "load",
    "preset",
    "train",
]

_HOMES = {
    "Adversary": "adversary",
    "Batch": "adversary",
    "Config": "config",
    "Launch": "training.train",
    "LoadedRun": "loading",
    "Trained": "training.train",
    "UserError": "errors",
    "load": "loading",
    "preset": "config",
    "train": "training.train",
}
"""The module of each name."""


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value  # found without this function from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
