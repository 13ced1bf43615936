"""A data set that a fake machine trains on in seconds."""

from pathlib import Path

from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits

COUNT = 400


def put_digits(folder: Path) -> None:
    """Write the first of the packaged digits into a folder, readable by all."""
    rows = Dataset.open("mnist").read("train", Dataset.open("mnist").pieces("train")[:1])
    assert rows.label is not None
    pictures = [
        RawImage(image, int(label), "digit")
        for image, label in zip(rows.image[:COUNT], rows.label[:COUNT], strict=True)
    ]
    write_splits({"train": pictures}, str(folder), DatasetMetadata("digits", "MNIST"))
    folder.chmod(0o755)
