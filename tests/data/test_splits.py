"""Splits by the names of folders and files."""

from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import labels_of
from helpers.random_images import Refused, WriteSource, pixels, read_sorted, rows_by_split, save

from cl_ray.data.dataset import Dataset


def test_folder_with_splits(tmp_path: Path, write_source: WriteSource) -> None:
    stored = pixels(6, 30, 30, 3)
    names = ("train/a/1", "train/b/1", "train/b/deep/2", "test/b/1", "valid/a/1", "valid/b/1")
    for name, image in zip(names, stored, strict=True):
        save(tmp_path / "in" / f"{name}.png", image)
    info, rows = write_source(tmp_path / "in")
    assert rows_by_split(info) == {
        "train": 3, "validation": 2, "test": 1,
    }  # fmt: skip
    assert list(info.splits) == ["train", "validation", "test"]
    assert np.array_equal(rows.image, stored[:3])
    assert labels_of(rows).tolist() == [0, 1, 1]
    test = read_sorted(Dataset.open(str(tmp_path / "made" / "set")), "test")
    assert np.array_equal(test.image, stored[3:4])
    assert labels_of(test).tolist() == [1]


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["Train", "Val"], {"train": 2, "validation": 2}),
        (["training", "TESTING"], {"train": 2, "test": 2}),
        (["eval", "dev", "train"], {"train": 2, "validation": 2, "test": 2}),
        (["set/images/train", "set/images/validation"], {"train": 2, "validation": 2}),
        (["set/train/images", "set/test/images"], {"train": 2, "test": 2}),
    ],
)
def test_usual_names_of_splits(
    tmp_path: Path, write_source: WriteSource, folders: list[str], splits: dict[str, int]
) -> None:
    for folder in folders:
        for kind in ("cat", "dog"):
            save(tmp_path / "in" / folder / kind / "1.png", pixels(1)[0])
    info, _ = write_source(tmp_path / "in")
    assert rows_by_split(info) == splits
    assert info.classes == ["cat", "dog"]


def test_a_folder_that_only_a_held_out_split_has_is_no_class(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    """Tiny ImageNet has the folder val/images, and the classes in a table that is not read here."""
    for k, name in enumerate(["train/n1/images", "train/n2/images", "val/images"]):
        save(tmp_path / "in" / name / f"{k}.png", pixels(1)[0])
    info, _ = write_source(tmp_path / "in")
    assert info.classes == ["n1", "n2"]
    assert [info.labelled_rows(split) for split in info.splits] == [2, 0]
    assert any(
        "Not used for labels: the folder images of the split validation" in note for note in notes
    )
    save(tmp_path / "in" / "val" / "n3" / "3.png", pixels(1)[0])
    assert write_source(tmp_path / "in")[0].classes == ["images", "n1", "n2", "n3"]


def test_folders_that_may_be_splits_or_classes(
    tmp_path: Path, write_source: WriteSource, refused: Refused
) -> None:
    for kind in ("bus", "train"):
        save(tmp_path / "mixed" / kind / "1.png", pixels(1)[0])
    message = refused(tmp_path / "mixed")
    assert "has the folder train, which is the name of a split, but bus/1.png is in no" in message
    assert "add `--splits none` if its folders are classes" in message
    assert write_source(tmp_path / "mixed", splits="none")[0].classes == ["bus", "train"]
    for kind in ("Test", "val"):
        save(tmp_path / "untrained" / kind / "1.png", pixels(1)[0])
    message = refused(tmp_path / "untrained")
    assert "has no training split but only Test, val: rename a folder to train, or add" in message
    assert write_source(tmp_path / "untrained", splits="none")[0].classes == ["Test", "val"]
