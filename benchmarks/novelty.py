"""One digit against the rest: how well `cl-ray score` tells digits that a run never saw.

    nice python benchmarks/novelty.py --storage runs/novelty --split test

For each digit, a run of the preset `quick` is trained on the training images of that digit alone,
without labels; runs that are in the storage already are taken as they are. Printed is the AUROC of
a split's images, this digit against the nine others, the protocol of one-class classification
(Ruff et al., 2018, "Deep one-class classification", section 4.1), of the distance that `cl-ray
score` ranks by and of what a run could be asked instead. One thread, about 80 s a digit.
"""

from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from bare import build_trainer
from sklearn.metrics import roc_auc_score

import cl_ray
from cl_ray import Config
from cl_ray.checkpoint import CheckpointStore
from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.novelty import NoveltyDetector, sample_known
from cl_ray.storage import RunStorage


def write_digit(digit: int, folder: str) -> None:
    """Write a dataset of one digit's images in the splits train and validation, without labels."""
    packaged, splits = Dataset.open("mnist"), {}
    for split in ("train", "validation"):
        rows = packaged.read(split)
        splits[split] = [RawImage(x, None, "") for x in rows.image[rows.label == digit]]
    write_splits(splits, folder, DatasetMetadata(f"digit-{digit}", "MNIST"))


def train_digit(digit: int, storage: Path, epochs: int) -> RunStorage:
    """Train a run on one digit, and write its last checkpoint; return its folder."""
    run, data = RunStorage.at(str(storage), f"digit-{digit}"), f"{storage}/data-{digit}"
    if not run.exists():
        write_digit(digit, data)
        config = Config(data=data, epochs=epochs, threads=1, device="cpu", precision="float32")
        trainer = build_trainer(config)
        for _ in range(epochs):
            trainer.train_epoch()
        run.write("config.yaml", config.to_yaml().encode())
        CheckpointStore(*run.open()).save(
            trainer.state_dict(), epoch=epochs, step=trainer.gan.steps
        )
    return run


def measure(run: RunStorage, digit: int, split: str) -> dict[str, float]:
    """Compute the AUROC of each measure on all digits of a split of MNIST."""
    model = cl_ray.load(run.uri, device="cpu")
    rows = Dataset.open("mnist").read(split)
    reconstructed = model.reconstruct(rows.image)
    of_pixels, held_out, pixels = (
        torch.from_numpy(images.reshape(len(images), -1) / np.float32(255))
        for images in (
            *(x.image for x in sample_known(Dataset.open(model.config.data))),
            rows.image,
        )
    )
    scores = {
        "distance": model.novelty(rows.image).distance,
        "pixels": NoveltyDetector(of_pixels, held_out).score(pixels).distance,
        "reconstruction": np.square(reconstructed / 255 - rows.image / 255).mean((1, 2, 3)),
        "D's score": -model.score(rows.image),
    }
    return {name: float(roc_auc_score(rows.label != digit, x)) for name, x in scores.items()}


def main(
    storage: Path,
    split: Literal["validation", "test"] = "validation",
    digits: tuple[int, ...] = tuple(range(10)),
    epochs: int = 3,
) -> None:
    """Print a line of each digit, and the mean."""
    torch.set_num_threads(1)
    found = []
    for digit in digits:
        found.append(measure(train_digit(digit, storage, epochs), digit, split))
        print(digit, " ".join(f"{name} {x:.4f}" for name, x in found[-1].items()), flush=True)
    means = {name: np.mean([x[name] for x in found]) for name in found[0]}
    print("mean", " ".join(f"{name} {x:.4f}" for name, x in means.items()))


if __name__ == "__main__":
    tyro.cli(main)
