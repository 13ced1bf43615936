"""Which reference the evaluations of a dataset have, by name: asked before torch is imported."""

from pathlib import Path

from cl_ray.data.dataset import PACKAGED, STACKED, Dataset
from cl_ray.data.stacked_mnist import is_stacked_mnist
from cl_ray.evaluation.config import MANIFOLD_NEIGHBOURS

_LEAST_IMAGES = 1000
"""A run or a search of fewer training images has none trained: its distances would say little about
an epoch, and the run is short. `cl-ray evaluate` trains it all the same."""


def resolve_reference(dataset: Dataset, name: str) -> str | None:
    """Return the name of a dataset's reference, `auto` resolved; None for none."""
    if name != "auto":
        return None if name == "none" else name
    if packaged := packaged_reference(dataset):
        return packaged
    kept = reference_path(dataset)
    return str(kept) if kept and kept.is_file() else None


def packaged_reference(dataset: Dataset) -> str | None:
    """Return the name of the reference that ships for a dataset; None if none does."""
    if is_stacked_mnist(dataset.info):
        return STACKED
    info, packaged = dataset.info, Dataset.open(PACKAGED).info
    return PACKAGED if (info.source, info.shape) == (packaged.source, packaged.shape) else None


def reference_path(dataset: Dataset) -> Path | None:
    """Return where a dataset's own classifier is kept: beside the data; None for data in a cloud.

    Its name is the dataset's fingerprint, so that other images or labels in the same place have
    another one.
    """
    if "://" in dataset.location:
        return None
    return Path(f"{dataset.location}.reference", f"{dataset.info.fingerprint}.safetensors")


def needs_training(dataset: Dataset) -> bool:
    """Return whether a dataset has no packaged reference, and enough images and labels."""
    return packaged_reference(dataset) is None and not lacks_images(dataset)


def lacks_images(dataset: Dataset) -> str:
    """Say which part of a dataset is too small for a reference; empty if none is."""
    parts = {f"the split {name}": split.rows for name, split in dataset.info.splits.items()}
    parts["the split train with a label"] = dataset.info.labelled_rows("train")
    few = 2 * MANIFOLD_NEIGHBOURS  # an evaluation compares half of the only split
    return next((f"{rows} images of {part}" for part, rows in parts.items() if rows <= few), "")


def expected_reference(dataset: Dataset) -> str | None:
    """Return the reference that `auto` will be after `prepare_reference`, if nothing fails."""
    path = reference_path(dataset)
    enough = dataset.info.labelled_rows("train") >= _LEAST_IMAGES
    if path and enough and needs_training(dataset):
        return str(path)
    return resolve_reference(dataset, "auto")
