"""Print a digest of the weights after 50 steps, to show that a change leaves the numerics alone.

`python benchmarks/digests.py > after.txt` in a changed checkout, the same in the one before it, and
`diff before.txt after.txt` prints nothing: one thread, float32, 16 packaged digits a batch, for
every objective in every family and for each option of the method. `digests.py NAME ...` takes the
named cases only. Digests differ between processors and builds of PyTorch.
"""

import hashlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from bare import build_trainer

from cl_ray.config import Config
from cl_ray.losses.adversarial import OBJECTIVES
from cl_ray.networks.build import FAMILIES

STEPS = 50


def cases() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the name and the changed fields of each configuration."""
    for family in FAMILIES:
        networks = {"generator": {"family": family}, "discriminator": {"family": family}}
        for objective in OBJECTIVES:
            yield f"{objective}/{family}", {"losses": {"objective": objective}, **networks}
    exact = {"objective": "relativistic", "r1": 2.0, "r2": 1.0, "gradient_penalty": 1.0}
    yield "classifier", {"condition": "classifier"}
    yield "projection", {"condition": "projection"}
    yield "contrad", {"losses": {"form": "contrad"}, "augment": {"shift": 0.2, "erase": 0.1}}
    yield "d_steps", {"optimizer": {"d_steps": 2}}
    yield "labels", {"pairs": {"mode": "labels"}}
    yield "exact penalties", {"losses": exact}
    yield "hard negatives", {"pairs": {"negatives": "hard"}}
    yield "spectral norm", {"discriminator": {"spectral_norm": True}}


def digest(fields: dict[str, Any]) -> str:
    """Compute SHA-256 of the weights of G, D and the EMA generator, in order of registration."""
    fixed = {"seed": 3, "batch_size": 16, "device": "cpu", "precision": "float32"}
    trainer = build_trainer(Config.model_validate({**fixed, **fields}))
    gan, batches = trainer.gan, trainer.loader.batches(epoch=0)
    for _ in range(STEPS):
        gan.train_step(next(batches))
    sha = hashlib.sha256()
    for network in (gan.generator, gan.discriminator, gan.ema_generator):
        for tensor in (*network.parameters(), *network.buffers()):
            sha.update(tensor.detach().contiguous().numpy().tobytes())
    return sha.hexdigest()[:24]


def main() -> None:
    """Print one line for each case."""
    torch.set_num_threads(1)
    for name, fields in cases():
        if not sys.argv[1:] or name in sys.argv[1:]:
            print(f"{name:32} {digest(fields)}", flush=True)


if __name__ == "__main__":
    main()
