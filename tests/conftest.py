from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from bucket import bucket  # noqa: F401

from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import About, Picture, write

MakeDigits = Callable[[int], str]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file stays together, and so do fake clouds, which share a bridge and the laptop's ports."""
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.split("::")[0]
            return "cluster" if "cluster" in file.split("/") else file

    return ByFile(config, log)


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
