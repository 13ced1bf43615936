"""The command's config, and which kind of source a name or folder is."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tyro
from helpers.datasets import labels_of
from helpers.random_images import WriteSource, pixels, save

from cl_ray.data.sources import SourceConfig, write_dataset
from cl_ray.errors import UserError


def test_labels_left_out_and_test_held_out(tmp_path: Path, write_source: WriteSource) -> None:
    for k, image in enumerate(pixels(10)):
        save(tmp_path / "in" / str(k % 2) / f"{k}.png", image)
    info, rows = write_source(tmp_path / "in", label_column="none", test_fraction=0.3)
    assert (info.labelled, info.classes, rows.label) == (False, None, None)
    assert (info.splits["train"].rows, info.splits["test"].rows) == (7, 3)


def test_folders_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("x")
    assert f"{tmp_path}/empty holds no image (.apng, " in refused(tmp_path / "empty")
    assert "or Parquet file but 1 .txt: give what does" in refused(tmp_path / "empty")
    assert f"{tmp_path}/none does not exist" in refused(tmp_path / "none")
    assert "notes.txt holds no image" in refused(tmp_path / "empty" / "notes.txt")
    image = pixels(1)[0]
    save(tmp_path / "loose" / "a" / "1.png", image)
    save(tmp_path / "loose" / "2.png", image)
    assert "has class folders (a), but 2.png is in none" in refused(tmp_path / "loose")
    save(tmp_path / "splits" / "train" / "1.png", image)
    save(tmp_path / "splits" / "extra" / "2.png", image)
    assert "but extra/2.png is in no split" in refused(tmp_path / "splits")
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


def test_config_becomes_flags() -> None:
    flags = "--source MNIST --out x --size 32 --color grey --test-fraction 0.1 --overwrite"
    config = tyro.cli(SourceConfig, args=flags.split())
    assert config == SourceConfig(
        source="MNIST", out="x", size=32, color="grey", test_fraction=0.1, overwrite=True
    )
    # A word of ours, and not tyro's for a missing value.
    flags = "--source MNIST --out x --label-column none"
    assert tyro.cli(SourceConfig, args=flags.split()).label_column == "none"
    wrongs: list[dict[str, Any]] = [
        {"size": 20},
        {"size": 257},
        {"test_fraction": 1.0},
        {"color": "sepia"},
        {"background": "transparency"},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SourceConfig(source="MNIST", out="x", **wrong)


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
