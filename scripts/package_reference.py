"""Make `cl_ray/evaluation/mnist.safetensors`, the classifier of digits that the package ships.

python scripts/package_reference.py
"""

from pathlib import Path

import torch

from cl_ray.data.dataset import PACKAGED, Dataset
from cl_ray.device import keep_freed_memory
from cl_ray.evaluation.classifier import ClassifierConfig
from cl_ray.evaluation.reference import train_reference

OUT = Path(__file__).parents[1] / "cl_ray" / "evaluation" / f"{PACKAGED}.safetensors"


def main() -> None:
    """Train the classifier, which takes minutes, and write it."""
    torch.set_num_threads(1)  # another number rounds differently
    keep_freed_memory()
    reference = train_reference(Dataset.open(PACKAGED), ClassifierConfig(), on_epoch=print)
    reference.save(str(OUT))
    print(f"{OUT}: {reference.metadata.accuracy:.2%} of the test images correct")


if __name__ == "__main__":
    main()
