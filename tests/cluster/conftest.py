import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import machines
from helpers.cloud import Cloud

COUNT = 400
"""Images of the dataset that the fake machines train on."""


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A fake cloud, where one can run."""
    reason = machines.missing_requirement()
    if reason:
        pytest.skip(reason)
    made = Cloud(tmp_path_factory.mktemp("cloud"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("client")


@pytest.fixture(scope="session")
def copy_digits(make_digits: Callable[[int], str]) -> Callable[[Path], None]:
    """A function that copies a small dataset to a folder, readable by all users."""

    def copy(folder: Path) -> None:
        shutil.copytree(make_digits(COUNT), folder)
        folder.chmod(0o755)

    return copy
