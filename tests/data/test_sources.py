"""The command's config, and which kind of source a name or folder is."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from fsspec.registry import _registry
from helpers.datasets import labels_of, mnist, write_images
from helpers.random_images import Refused, WriteSource, pixels, rows_by_split, save

from cl_ray import storage
from cl_ray.data.dataset import Dataset
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset
from cl_ray.errors import UserError


def test_folders_refused(tmp_path: Path, write_source: WriteSource, refused: Refused) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert f"{tmp_path}/empty holds no image (AVIF, " in refused(tmp_path / "empty")
    assert "or Parquet file but 1 .txt: give what does" in refused(tmp_path / "empty")
    assert f"{tmp_path}/none does not exist" in refused(tmp_path / "none")
    assert "notes.txt holds no image" in refused(tmp_path / "empty" / "notes.txt")
    image = pixels(1)[0]
    save(tmp_path / "loose" / "a" / "1.png", image)
    save(tmp_path / "loose" / "2.png", image)
    message = refused(tmp_path / "loose")
    assert (
        "has class folders (a), but 2.png is in none: move it, or leave the labels out" in message
    )
    assert write_source(tmp_path / "loose", label_column="none")[1].label is None
    save(tmp_path / "both" / "1.png", image)
    pq.write_table(pa.table({"x": [1]}), tmp_path / "both" / "2.parquet")
    assert "holds both 1.png and 2.parquet" in refused(tmp_path / "both")
    assert "cannot be opened" in refused("nosuch://bucket/key")


def test_a_single_file(tmp_path: Path, write_source: WriteSource) -> None:
    image = save(tmp_path / "in" / "1.png", pixels(1)[0])
    save(tmp_path / "in" / "2.png", pixels(1)[0])
    info, rows = write_source(tmp_path / "in" / "1.png")
    assert info.source == f"{tmp_path}/in/1.png"
    assert np.array_equal(rows.image[..., 0], [image])
    pq.write_table(pa.table({"image": [(tmp_path / "in" / "1.png").read_bytes()]}), tmp_path / "p")
    (tmp_path / "p").rename(tmp_path / "one.parquet")
    assert np.array_equal(write_source(tmp_path / "one.parquet")[1].image[..., 0], [image])


def test_taken_out_is_refused_before_the_source_is_looked_at(tmp_path: Path) -> None:
    save(tmp_path / "out" / "holiday.png", pixels(1)[0])
    with pytest.raises(UserError, match=r"holds holiday.png, which is no part"):
        write_dataset(SourceConfig(source="/none", out=str(tmp_path / "out"), overwrite=True))


def test_copy_of_a_data_set_is_the_same(tmp_path: Path, write_source: WriteSource) -> None:
    for k, image in enumerate(pixels(90)):
        save(tmp_path / "in" / "abc"[k % 3] / f"{k}.png", image)
    first, copy = str(tmp_path / "first"), str(tmp_path / "copy")
    info = write_dataset(SourceConfig(source=f"{tmp_path}/in", out=first, licence="CC0", seed=3))
    again = write_dataset(SourceConfig(source=first, out=copy, seed=3))
    assert again.model_copy(update={"name": "first"}) == info
    larger, rows = write_source(first, size=32, color="rgb")
    assert (larger.shape, larger.classes, larger.source) == (
        (32, 32, 3),
        ["a", "b", "c"],
        info.source,
    )
    assert labels_of(rows).tolist() == [0] * 30 + [1] * 30 + [2] * 30


class Hub(DirFileSystem):
    """A local folder under the protocol of Hugging Face's hub, with relative paths like its own."""

    protocol = "hf"
    root = ""

    def __init__(self) -> None:
        super().__init__(path=Hub.root, fs=LocalFileSystem(), skip_instance_cache=True)

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("hf://")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the hub's datasets."""
    monkeypatch.setattr(Hub, "root", str(tmp_path))
    monkeypatch.setitem(_registry, "hf", Hub)
    storage._connect.cache_clear()
    return tmp_path / "datasets"


def test_datasets_of_the_hub(hub: Path, write_source: WriteSource, refused: Refused) -> None:
    stored = pixels(12)
    for split, images in (("train", stored[:8]), ("test", stored[8:])):
        folder = hub / "owner" / "name" / "data"
        folder.mkdir(parents=True, exist_ok=True)
        cells: list[Any] = [{"bytes": None, "path": f"{split}{k}.png"} for k in range(len(images))]
        for k, image in enumerate(images):
            save(folder / f"{split}{k}.png", image)
            if split == "train":
                cells[k] = {"bytes": (folder / f"{split}{k}.png").read_bytes(), "path": None}
        table = pa.table({"image": cells, "label": [k % 2 for k in range(len(images))]})
        pq.write_table(table, folder / f"{split}-00000-of-00001.parquet")
    (hub / "owner" / "name" / "README.md").write_text("x")
    info, rows = write_source("hf://datasets/owner/name", image_column="image")
    assert rows_by_split(info) == {"train": 8, "test": 4}
    assert np.array_equal(rows.image[..., 0], stored[:8])
    assert info.source == "hf://datasets/owner/name"
    assert "hf://datasets/owner/other does not exist" in refused("hf://datasets/owner/other")


def test_errors_of_the_hub_are_one_sentence(
    hub: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def info(*_: Any, **__: Any) -> None:
        raise RuntimeError("Repository not found\nfor url X")

    monkeypatch.setattr(Hub, "info", info)
    message = refused("hf://datasets/owner/name")
    assert "hf://datasets/owner/name cannot be read (RuntimeError: Repository not found" in message


def test_hub_without_its_library(refused: Refused, monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    storage._connect.cache_clear()
    message = refused("hf://datasets/owner/name")
    assert message.endswith("`pip install huggingface_hub`.")


def test_an_encoded_dataset_is_a_source(write_source: WriteSource, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "png", encoding="png", train=mnist("train", 30))
    info, rows = write_source(folder, encoding="raw")
    assert (info.encoding, Dataset.open(folder).info.encoding) == ("raw", "png")
    assert np.array_equal(rows.image, mnist("train", 30)[0])
    info, again = write_source(folder, size=32, encoding="jpeg", quality=90)
    assert (info.encoding, info.shape) == ("jpeg", (32, 32, 1))
    assert np.array_equal(labels_of(again), labels_of(rows))
    with pytest.raises(ValueError, match="quality 90 is of JPEG only: add `--encoding jpeg`"):
        write_source(folder, quality=90)
