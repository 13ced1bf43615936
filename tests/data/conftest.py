import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import mnist, write_images
from helpers.random_images import Refused, WriteSource, read_sorted

from cl_ray.data import writer
from cl_ray.data.dataset import Dataset, DatasetInfo, RowBatch
from cl_ray.data.decoding import Encoding
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset
from cl_ray.errors import UserError


@pytest.fixture
def notes() -> list[str]:
    """What the last call of `write_source` was told is left out or chosen."""
    return []


@pytest.fixture
def write_source(tmp_path: Path, notes: list[str]) -> WriteSource:
    """Makes a dataset of a source; returns its record and its train rows in source order."""

    def run(source: str | Path, **flags: Any) -> tuple[DatasetInfo, RowBatch]:
        notes.clear()
        out = str(tmp_path / "made" / "set")
        config = SourceConfig(source=str(source), out=out, overwrite=True, **flags)
        written = write_dataset(config, note=notes.append)
        data = Dataset.open(out)
        assert data.info == written
        return written, read_sorted(data)

    return run


@pytest.fixture
def refused(tmp_path: Path) -> Refused:
    """Expects a source to be refused in one sentence, with nothing left; returns the sentence."""

    def run(source: str | Path, **flags: Any) -> str:
        folder = tmp_path / "refused"
        with pytest.raises(UserError) as caught:
            write_dataset(SourceConfig(source=str(source), out=str(folder / "set"), **flags))
        message = str(caught.value)
        assert "\n" not in message
        assert message.endswith(".")
        assert not folder.exists() or not os.listdir(folder)
        return message

    return run


@pytest.fixture(scope="session")
def small_groups(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Dataset]:
    """Makes datasets of the first digits, in row groups of 64 rows and files of 2 row groups."""
    made: dict[tuple[int, Encoding], Dataset] = {}

    def make(count: int, encoding: Encoding = "raw") -> Dataset:
        if (count, encoding) not in made:
            folder = tmp_path_factory.mktemp("data") / "digits"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(writer, "GROUP_BYTES", 1)
                patch.setattr(writer, "GROUPS_PER_SHARD", 2)
                patch.setattr(writer, "SHARD_BYTES", 40_000)
                out = write_images(folder, encoding=encoding, train=mnist("train", count))
                made[count, encoding] = Dataset.open(out)
        return made[count, encoding]

    return make
