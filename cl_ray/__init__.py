"""cl_ray: adversarial contrastive learning from images, on one laptop or a Ray cluster.

`from cl_ray import Config, train` does what `cl-ray train` does. Names are imported when they are
first used, so that `import cl_ray` itself needs neither torch nor ray.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cl_ray.batch import PairBatch
    from cl_ray.config import Config, LaunchOptions, preset
    from cl_ray.errors import UserError
    from cl_ray.gan import ContrastiveGAN
    from cl_ray.model import TrainedModel, load
    from cl_ray.trainer import Trainer
    from cl_ray.training.launch import TrainResult, train

__all__ = [
    "Config",
    "ContrastiveGAN",
    "LaunchOptions",
    "PairBatch",
    "TrainResult",
    "TrainedModel",
    "Trainer",
    "UserError",
    "load",
    "preset",
    "train",
]

_MODULES = {
    "Config": "config",
    "ContrastiveGAN": "gan",
    "LaunchOptions": "config",
    "PairBatch": "batch",
    "TrainResult": "training.launch",
    "TrainedModel": "model",
    "Trainer": "trainer",
    "UserError": "errors",
    "load": "model",
    "preset": "config",
    "train": "training.launch",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used (PEP 562)."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value  # the next access does not call this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
