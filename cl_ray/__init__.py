"""cl_ray: adversarial contrastive learning from images, on one laptop or a Ray cluster.

`from cl_ray import Config, train` does what `cl-ray train` does. A name is imported when it is
first used: `import cl_ray` itself needs neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_ray.config import Config, preset
    from cl_ray.errors import UserError
    from cl_ray.gan import ContrastiveGAN, PairBatch
    from cl_ray.model import TrainedModel, load
    from cl_ray.training.launch import LaunchOptions, TrainResult, train

__all__ = [
    "Config",
    "ContrastiveGAN",
    "LaunchOptions",
    "PairBatch",
    "TrainResult",
    "TrainedModel",
    "UserError",
    "load",
    "preset",
    "train",
]

_HOMES = {
    "ContrastiveGAN": "gan",
    "PairBatch": "gan",
    "Config": "config",
    "LaunchOptions": "training.launch",
    "TrainedModel": "model",
    "TrainResult": "training.launch",
    "UserError": "errors",
    "load": "model",
    "preset": "config",
    "train": "training.launch",
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
