"""The write side of data at rest, on real Parquet files."""

import os
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from helpers.datasets import labels_of
from helpers.random_images import METADATA, images, raw_images

from cl_ray import storage as storage_module
from cl_ray.data import writer
from cl_ray.data.dataset import UNLABELLED, Dataset
from cl_ray.data.decoding import BrokenImageError, decoder_errors
from cl_ray.data.writer import DatasetMetadata, RawImage, check_output_free, write_splits
from cl_ray.errors import UserError


def test_seed_decides_the_order_and_the_bytes(tmp_path: Path) -> None:
    digests, orders = [], []
    for number, seed in enumerate((0, 0, 1)):
        out = str(tmp_path / str(number))
        info = write_splits({"train": raw_images(images(300))}, out, METADATA, seed=seed)
        digests.append(info.splits["train"].shards[0].sha256)
        orders.append(Dataset.open(out).read("train").id.tolist())
    assert digests[0] == digests[1] != digests[2]
    assert orders[0] != sorted(orders[0]) != orders[2] != orders[0]


@pytest.mark.parametrize(
    ("fractions", "counts"),
    [
        ({"test_fraction": 0.25}, {"train": 90, "test": 30}),
        ({"validation_fraction": None}, {"train": 108, "validation": 12}),
        (
            {"validation_fraction": 0.1, "test_fraction": 0.25},
            {"train": 78, "validation": 12, "test": 30},
        ),
    ],
)
def test_held_out_images_are_random_ones_of_every_class(
    tmp_path: Path, fractions: dict[str, Any], counts: dict[str, int]
) -> None:
    pixels = images(120)
    out = str(tmp_path / "set")
    write_splits({"train": raw_images(pixels, True)}, out, METADATA, **fractions)
    data = Dataset.open(out)
    assert {split: part.rows for split, part in data.info.splits.items()} == counts
    found = {split: data.read(split) for split in counts}
    everything = np.concatenate([rows.id for rows in found.values()])
    assert sorted(everything) == list(range(120))
    for split, rows in found.items():
        assert np.array_equal(rows.image, pixels[rows.id])
        assert labels_of(rows).tolist() == [number % 3 for number in rows.id]
        assert np.bincount(labels_of(rows)).tolist() == [counts[split] // 3] * 3
        gaps = np.diff(np.sort(rows.id))
        assert split == "train" or len({*gaps.tolist()}) > 1  # neither the tail nor every tenth


def test_classes_that_are_not_in_every_split_are_named(tmp_path: Path) -> None:
    notes: list[str] = []

    def written(counts: list[int], classes: list[str] | None, fraction: float) -> list[str]:
        notes.clear()
        labels = np.repeat(np.arange(len(counts)), counts)
        raw = [RawImage(images(1)[0], int(label), "image") for label in labels]
        write_splits(
            {"train": raw},
            str(tmp_path / "set"),
            replace(METADATA, classes=classes),
            test_fraction=fraction,
            overwrite=True,
            note=notes.append,
        )
        return notes

    names = [f"c{k}" for k in range(13)]
    assert written([50, 50], ["a", "b"], 0.2) == []
    common = "The split test has no image of the "
    assert written([190, 1], None, 0.02) == [f"{common}class 1 (1 image)."]
    (note,) = written([2] * 12 + [300], names, 0.03)
    there = np.unique(labels_of(Dataset.open(str(tmp_path / "set")).read("test")))
    absent = [f"c{k} (2 images)" for k in range(13) if k not in there]
    assert len(absent) == 11
    assert note == f"{common}11 classes {', '.join(absent[:10])}, and 1 more."


def test_origins_follow_their_images(tmp_path: Path) -> None:
    out = str(tmp_path / "set")
    pixels = images(2500)
    raw = (replace(r, origin=f"é/{n}.png") for n, r in enumerate(raw_images(pixels)))
    assert write_splits({"train": raw}, out, METADATA, test_fraction=0.2).origins
    data = Dataset.open(out)
    for split in ("train", "test"):
        rows = data.read(split, origins=True)
        assert rows.origin is not None
        assert rows.origin.tolist() == [f"é/{number}.png" for number in rows.id]
        assert np.array_equal(rows.image, pixels[rows.id])
        some = rows.take(slice(7, 9)).origin
        assert some is not None
        assert some.tolist() == rows.origin[7:9].tolist()
    assert data.read("train").origin is None
    undecodable = replace(next(raw_images(images(1))), origin="\udcff.png")
    write_splits({"train": [undecodable]}, out, METADATA, overwrite=True)
    rows = Dataset.open(out).read("train", origins=True)
    assert rows.origin is not None
    assert rows.origin.tolist() == ["\\udcff.png"]
    signed = replace(next(raw_images(images(1))), origin="https://me:pw@host/1 a.png?token=key#x")
    write_splits({"train": [signed]}, out, METADATA, overwrite=True)
    rows = Dataset.open(out).read("train", origins=True)
    assert rows.origin is not None
    assert rows.origin.tolist() == ["https://host/1 a.png"]
    write_splits({"train": raw_images(images(2))}, out, METADATA, overwrite=True)
    assert Dataset.open(out).read("train", origins=True).origin is None


@pytest.mark.parametrize(("side", "encoding"), [(64, "raw"), (68, "png")])
def test_larger_images_are_encoded_in_larger_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, side: int, encoding: str
) -> None:
    monkeypatch.setattr(writer, "GROUPS_PER_SHARD", 1)
    monkeypatch.setattr(writer, "SHARD_BYTES", 2_300_000)
    out, pixels = str(tmp_path / "set"), images(500, side, 3)
    info = write_splits({"train": raw_images(pixels)}, out, METADATA)
    assert info.encoding == encoding
    shards, groups = info.splits["train"].shards, -(-500 // info.row_group)
    assert len(shards) == (groups if encoding == "raw" else 3)  # 500 × 14 kB
    data = Dataset.open(out)
    assert [group.rows for group in data.row_groups("train")][:-1] == [info.row_group] * (
        groups - 1
    )
    rows = data.read("train")
    assert np.array_equal(rows.image, pixels[rows.id])


def test_broken_images_do_not_stay_in_memory(tmp_path: Path) -> None:
    class Content(bytearray):
        """A file's content, which can be referred to weakly."""

    contents: list[weakref.ref[Content]] = []

    def read() -> None:
        content = Content(b"x")
        contents.append(weakref.ref(content))
        with decoder_errors("x.png"):
            content[1] = 0

    def broken() -> Iterator[RawImage | BrokenImageError]:
        yield from raw_images(images(1))
        for _ in range(3):
            try:
                read()
            except BrokenImageError as error:
                yield error
            assert contents[-1]() is None

    write_splits({"train": broken()}, str(tmp_path / "set"), METADATA, skip_broken=True)
    assert len(contents) == 3


def test_unlabelled_images_are_kept_and_held_out_like_a_class(tmp_path: Path) -> None:
    pixels = images(200)
    labels = [None if k % 2 else k // 2 % 2 for k in range(200)]
    raw = [RawImage(image, label, "x") for image, label in zip(pixels, labels, strict=True)]
    out = str(tmp_path / "set")
    info = write_splits({"train": raw}, out, METADATA, test_fraction=0.2)
    data = Dataset.open(out)
    assert info.labelled
    assert [part.unlabelled for part in info.splits.values()] == [80, 20]
    assert [info.labelled_rows(split) for split in info.splits] == [80, 20]
    for split in info.splits:
        rows = data.read(split)
        expected = [UNLABELLED if labels[k] is None else labels[k] for k in rows.id]
        assert labels_of(rows).tolist() == expected
        part = rows.labelled()
        assert np.array_equal(part.image, pixels[part.id])
        assert sorted(part.id.tolist()) == sorted(k for k in rows.id if k % 2 == 0)
    table = pq.read_table(Path(out) / info.splits["train"].shards[0].file)
    assert table["label"].null_count == 80
    assert data.class_names() == ["0", "1"]
    assert data.class_counts("train") == [40, 40]
    assert data.only_label("train") is None
    assert info.splits["train"].label_counts == {0: 40, 1: 40}
    record = info.splits["train"].model_copy(update={"label_counts": None})  # of an older version
    older = replace(data, info=info.model_copy(update={"splits": {"train": record}}))
    assert older.class_counts("train") == [40, 40]
    assert older.only_label("train") is None


def test_a_split_may_have_no_label(tmp_path: Path) -> None:
    out = str(tmp_path / "set")
    write_splits(
        {"train": raw_images(images(9), True), "test": raw_images(images(8))}, out, METADATA
    )
    data = Dataset.open(out)
    assert (data.info.labelled_rows("train"), data.info.labelled_rows("test")) == (9, 0)
    assert labels_of(data.read("test")).tolist() == [UNLABELLED] * 8
    assert data.read("test").labelled().label is None
    assert data.class_names() == ["0", "1", "2"]
    assert data.class_counts("test") == [0, 0, 0]


def test_names_of_classes_that_no_image_has_are_left_out(tmp_path: Path) -> None:
    metadata = DatasetMetadata("tiny", "a test", classes=["a", "b"])
    info = write_splits({"train": raw_images(images(9))}, str(tmp_path / "set"), metadata)
    assert (info.labelled, info.classes) == (False, None)


def test_few_images_have_no_validation_split_by_default(tmp_path: Path) -> None:
    info = write_splits(
        {"train": raw_images(images(90))}, str(tmp_path / "set"), METADATA, validation_fraction=None
    )
    assert list(info.splits) == ["train"]


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_empty_held_out_split_is_refused(tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UserError, match=" of 4 images leaves a split empty"):
        write_splits(
            {"train": raw_images(images(4))},
            str(tmp_path / "set"),
            METADATA,
            test_fraction=fraction,
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("split", ["validation", "test"])
def test_holding_out_beside_such_a_split_is_refused(tmp_path: Path, split: str) -> None:
    splits = {"train": raw_images(images(4)), split: raw_images(images(4))}
    fraction: dict[str, Any] = {f"{split}_fraction": 0.5}
    with pytest.raises(UserError, match=f"a {split} split of its own: leave --{split}-fraction"):
        write_splits(splits, str(tmp_path / "set"), METADATA, **fraction)


def bad(image: np.ndarray, label: int | None = None) -> RawImage:
    return RawImage(image, label, "bad.png")


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (bad(images(1, 30)[0]), r"bad.png is 30 × 30 and image 0 is 28 × 28: add `--size N`"),
        (bad(images(1, 28, 3)[0]), "bad.png is in colour and image 0 is grey: add `--color grey`"),
    ],
)
def test_images_that_do_not_go_together_leave_nothing(
    tmp_path: Path, picture: RawImage, message: str
) -> None:
    def stream() -> Iterator[RawImage]:
        yield from raw_images(images(3))
        yield picture

    with pytest.raises(UserError, match=message):
        write_splits({"train": stream()}, str(tmp_path / "set"), METADATA)
    with pytest.raises(UserError, match=message):
        write_splits(
            {"train": raw_images(images(3)), "test": [picture]}, str(tmp_path / "set"), METADATA
        )
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (bad(images(1, 28)[0][:, :26]), "bad.png is not square but 26 × 28: add `--size N`"),
        (bad(images(1, 15)[0]), "bad.png is 15 × 15, and sides are 16 to 256: add `--size N`"),
        (bad(images(1, 257)[0]), "bad.png is 257 × 257"),
        (bad(images(1)[0], -1), "bad.png has the label -1, but classes are 0 to 1: leave"),
        (bad(images(1)[0], 2), "bad.png has the label 2, but classes are 0 to 1: leave"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    tmp_path: Path, picture: RawImage, message: str
) -> None:
    about = DatasetMetadata(name="tiny", source="a test", classes=["a", "b"])
    with pytest.raises(UserError, match=message):
        write_splits({"train": [picture]}, str(tmp_path / "set"), about)
    assert os.listdir(tmp_path) == []


def test_empty_split_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no image in the split test"):
        write_splits({"train": raw_images(images(3)), "test": []}, str(tmp_path / "set"), METADATA)


def test_existing_folder_is_kept_unless_overwritten(tmp_path: Path) -> None:
    out = str(tmp_path / "set")
    write_splits({"train": raw_images(images(3))}, out, METADATA)
    with pytest.raises(UserError, match=f"{out} exists already: .*--overwrite"):
        write_splits({"train": raw_images(images(5))}, out, METADATA)

    def failing() -> Iterator[RawImage]:
        yield from raw_images(images(5))
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write_splits({"train": failing()}, out, METADATA, overwrite=True)
    assert len(Dataset.open(out).read("train").id) == 3
    write_splits({"train": raw_images(images(5))}, out, METADATA, overwrite=True)
    assert len(Dataset.open(out).read("train").id) == 5
    assert os.listdir(tmp_path) == ["set"]


def test_old_data_comes_back_if_the_new_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = str(tmp_path / "set")
    write_splits({"train": raw_images(images(3))}, out, METADATA)
    rename = os.rename

    def failing(old: str, new: str) -> None:
        if old.endswith("/new"):
            raise PermissionError("no")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(UserError, match=f"{out} cannot be written: no"):
        write_splits({"train": raw_images(images(5))}, out, METADATA, overwrite=True)
    assert len(Dataset.open(out).read("train").id) == 3
    assert os.listdir(tmp_path) == ["set"]


def test_all_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, rename = os.fsync, os.rename

    def record_sync(descriptor: int) -> None:
        calls.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    def record_rename(old: str, new: str) -> None:
        calls.append(f"to {new}")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", record_sync)
    monkeypatch.setattr(os, "rename", record_rename)
    out = tmp_path / "set"
    write_splits({"train": raw_images(images(50))}, str(out), METADATA)
    moved = calls.index(f"to {out}")
    assert {Path(path).name for path in calls[:moved]} == {"new", *(p.name for p in out.iterdir())}
    assert calls[moved + 1 :] == [str(tmp_path)]


def test_work_is_done_hidden_beside_the_target(tmp_path: Path) -> None:
    seen: list[list[str]] = []
    write_splits(
        {"train": raw_images(images(3))},
        str(tmp_path / "set"),
        METADATA,
        progress=lambda stage, done, total: seen.append(os.listdir(tmp_path)),
    )
    assert all(len(names) == 1 and names[0].startswith(".set-") for names in seen)
    assert len(seen) == 2


def test_foreign_files_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds thesis.tex, which is no part of a dataset"):
        write_splits({"train": raw_images(images(3))}, str(tmp_path), METADATA, overwrite=True)
    with pytest.raises(UserError, match="is a file"):
        check_output_free(str(tmp_path / "thesis.tex"), overwrite=True)
    with pytest.raises(UserError, match="mnist names the packaged dataset"):
        check_output_free("mnist", overwrite=True)
    with pytest.raises(UserError, match="cannot be written"):
        write_splits(
            {"train": raw_images(images(3))}, str(tmp_path / "thesis.tex" / "set"), METADATA
        )
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_far_filesystem_gets_the_record_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A filesystem that is not local, as s3:// would be: no rename, so the order is what counts.
    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(storage_module, "_connect", lambda location: (bucket, "key/set"))
    out = "s3://bucket/key/set"
    write_splits({"train": raw_images(images(85 * 17, 64, 3))}, out, METADATA)
    folder = tmp_path / "key" / "set"
    assert len(list(folder.glob("train-*-of-00002.parquet"))) == 2
    first = Dataset.open(out)
    assert first.location == out
    assert len(first.read("train").id) == 85 * 17

    record = folder / "dataset.json"
    seen: list[bool] = []
    write_splits(
        {"train": raw_images(images(3))},
        out,
        METADATA,
        overwrite=True,
        progress=lambda stage, done, total: seen.append(record.exists()),
    )
    # There while the source is read, gone before a shard is written, back at the end.
    assert seen == [True, False]
    assert sorted(os.listdir(folder)) == ["dataset.json", "train-00000-of-00001.parquet"]
    assert len(Dataset.open(out).read("train").id) == 3
