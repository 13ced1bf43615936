from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bucket import bucket  # noqa: F401

from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import About, Picture, write

MakeDigits = Callable[[int], str]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where files run side by side, a file stays together, and so do all fake clouds: one bridge."""
    for item in items:
        cloud = item.path.parent.name == "cluster"
        item.add_marker(pytest.mark.xdist_group("cluster" if cloud else item.path.stem))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Small tensors on busy cores: two threads wait for each other longer than they work."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_digits(tmp_path_factory: pytest.TempPathFactory) -> MakeDigits:
    """Makes a data set of the first so many packaged digits."""
    rows = Dataset.open("mnist").read("train", Dataset.open("mnist").pieces("train")[:2])
    assert rows.label is not None

    def make(count: int) -> str:
        folder: Path = tmp_path_factory.mktemp("digits") / f"digits{count}"
        pictures = [
            Picture(image, int(label), f"digit {i}")
            for i, (image, label) in enumerate(zip(rows.image, rows.label, strict=True))
        ]
        write({"train": pictures[:count]}, str(folder), About("digits", "MNIST"))
        return str(folder)

    return make
