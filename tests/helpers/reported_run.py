"""A run in this process with all that a worker writes down, and what an evaluation writes."""

from pathlib import Path
from typing import Any

from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer
from cl_ray.training.run_logger import RunLogger

SMALL = {"depth": 2, "width": 4}
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
            "knn_1": {"accuracy": 0.9767, "spread": None, "setting": "Euclidean", "seconds": 3.0},
            "few_labels": {"accuracy": 0.88, "spread": 0.0123, "setting": "", "seconds": 3.0},
        },
        "encoder": {"knn_1": {"accuracy": 0.91, "spread": None, "setting": "", "seconds": 3.0}},
    },
    "reconstruction": {"error": 0.0213, "mean_image": 0.0673},
    "notes": ["A note of <the> evaluation."],
}


def write_digits(folder: Path, labelled: bool = True, test: bool = True) -> str:
    """Some packaged digits as a data set, with labels and a split test or without."""
    mnist = Dataset.open("mnist")
    splits = {}
    for split, count in {"train": TRAIN, "test": TEST}.items():
        rows = mnist.read(split, mnist.row_groups(split)[:1])
        assert rows.label is not None
        splits[split] = [
            RawImage(image, int(label) if labelled else None, f"{split} {i}")
            for i, (image, label) in enumerate(zip(rows.image, rows.label, strict=True))
        ][:count]
    if not test:
        del splits["test"]
    write_splits(splits, str(folder), DatasetMetadata("digits", "MNIST"))
    return str(folder)


def train(folder: RunStorage, data: str, epochs: int = EPOCHS) -> None:
    """A run in this process, with all that a worker writes down."""
    config = Config(
        name=folder.name, storage=folder.storage, data=data, epochs=epochs, batch_size=32,
        log_every=2, seed=7, generator=SMALL, discriminator=SMALL,
    )  # fmt: skip
    folder.write("config.yaml", config.to_yaml().encode())
    run = Trainer(config, InMemoryLoader.read(Partition(Dataset.open(data), config)))
    logger, checkpoints = RunLogger(folder, run, config), CheckpointStore(*folder.open())
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
