"""A run in this process with all that a worker writes down, and what an evaluation writes."""

from pathlib import Path
from typing import Any

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config
from cl_ray.storage import RunStorage
from cl_ray.training.run_logger import RunLogger
from helpers.datasets import mnist, write_images
from helpers.run_folder import build_trainer

TRAIN, TEST, EPOCHS = 300, 90, 3
RECORDS = EPOCHS * 5
"""Ten steps an epoch, a record every two of them."""

SUMMARY = {
    "epochs": EPOCHS,
    "steps": 30,
    "device": "cpu, 1 threads, float32",
    "workers": 1,
    "seconds": 352.4,
    "training_seconds": 301.0,
    "worker_peak_bytes": 1_231_097_856,
    "parameters": {"generator": 353_227, "discriminator": 477_345},
    "versions": {"cl-ray": "0.1.0", "torch": "2.14.1"},
}
EVALUATION: dict[str, Any] = {
    "checkpoint": "step-00000030",
    "step": 30,
    "data": "digits",
    "pairs": "views",
    "seconds": 80.1,
    "fidelity": {
        "features": "mnist-classifier",
        "count": 10000,
        "metrics": {
            "frechet": {"value": 1.9, "real_baseline": 0.03},
            "kernel": {"value": 0.004, "real_baseline": 0.00001},
            "precision": {"value": 0.81, "real_baseline": 0.95},
            "label_balance": {"value": 0.4, "real_baseline": 0.8},
            "something_new": {"value": 0.123, "real_baseline": None},
        },
        "histogram": [980, 1200, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 820],
    },
    "representation": {
        "discriminator": {
            "knn_1": {"value": 0.9767, "spread": None, "setting": "Euclidean", "seconds": 3.0},
            "few_labels": {"value": 0.88, "spread": 0.0123, "setting": "", "seconds": 3.0},
            "cluster_accuracy": {"value": 0.912, "spread": 0.0345},
            "uniformity": {"value": -2.345, "spread": None},
        },
        "encoder": {"knn_1": {"value": 0.91, "spread": None, "setting": "", "seconds": 3.0}},
    },
    "reconstruction": {"error": 0.0213, "mean_image": 0.0673},
    "notes": ["A note of <the> evaluation."],
}


def write_digits(folder: Path, labelled: bool = True, test: bool = True) -> str:
    """Some packaged digits as a data set, with labels and a split test or without."""
    splits: dict[str, Any] = {}
    for split, count in {"train": TRAIN, **({"test": TEST} if test else {})}.items():
        images, labels = mnist(split, count)
        splits[split] = images, labels if labelled else [None] * count
    return write_images(folder, **splits)


def train(folder: RunStorage, data: str, epochs: int = EPOCHS) -> None:
    """A run in this process, with all that a worker writes down."""
    where = {"name": folder.name, "storage": folder.storage}
    run = build_trainer(data, **where, epochs=epochs, log_every=2, seed=7)
    assert isinstance(run.config, Config)
    folder.write("config.yaml", run.config.to_yaml().encode())
    logger, checkpoints = RunLogger(folder, run, run.config), CheckpointStore(*folder.open())
    for _ in range(epochs):
        metrics = run.train_epoch(logger.log_steps)
        logger.log_epoch(metrics)
        checkpoints.save(
            run.state_dict(), epoch=run.epochs, step=run.gan.steps, metric=1 / run.epochs
        )
    logger.close()


def run_storage(path: Path) -> RunStorage:
    """The run folder at a local path."""
    return RunStorage.at(str(path.parent), path.name)
