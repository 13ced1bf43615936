"""The write side of data at rest, on real Parquet files."""

import os
import re
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from tempfile import gettempdir
from typing import Any

import numpy as np
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest
from helpers.datasets import labels_of
from helpers.random_images import METADATA, images, raw_images, rows_by_split

from cl_ray import storage as storage_module
from cl_ray.data import writer
from cl_ray.data.dataset import UNLABELLED, Dataset
from cl_ray.data.decoding import BrokenImageError, decoder_errors
from cl_ray.data.writer import DatasetMetadata, RawImage, check_output_free, write_splits
from cl_ray.errors import UserError

Write = Callable[..., Dataset]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes splits to the folder `set`, over what is there; images alone are those of train."""

    def run(
        splits: Iterable[RawImage] | dict[str, Iterable[RawImage]],
        metadata: DatasetMetadata = METADATA,
        **options: Any,
    ) -> Dataset:
        splits = splits if isinstance(splits, dict) else {"train": splits}
        out = str(tmp_path / "set")
        write_splits(splits, out, metadata, **{"overwrite": True, **options})
        return Dataset.open(out)

    return run


def test_seed_decides_the_order_and_the_bytes(write: Write) -> None:
    digests, orders = [], []
    for seed in (0, 0, 1):
        data = write(raw_images(images(300)), seed=seed)
        digests.append(data.info.splits["train"].shards[0].sha256)
        orders.append(data.read("train").id.tolist())
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
    write: Write, fractions: dict[str, Any], counts: dict[str, int]
) -> None:
    pixels = images(120)
    data = write(raw_images(pixels, True), **fractions)
    assert rows_by_split(data.info) == counts
    found = {split: data.read(split) for split in counts}
    everything = np.concatenate([rows.id for rows in found.values()])
    assert sorted(everything) == list(range(120))
    for split, rows in found.items():
        assert np.array_equal(rows.image, pixels[rows.id])
        assert labels_of(rows).tolist() == [number % 3 for number in rows.id]
        assert np.bincount(labels_of(rows)).tolist() == [counts[split] // 3] * 3
        gaps = np.diff(np.sort(rows.id))
        assert split == "train" or len({*gaps.tolist()}) > 1  # neither the tail nor every tenth


def test_classes_that_are_not_in_every_split_are_named(write: Write) -> None:
    notes: list[str] = []

    def written(counts: list[int], classes: list[str] | None, fraction: float) -> Dataset:
        notes.clear()
        labels = np.repeat(np.arange(len(counts)), counts)
        raw = [RawImage(images(1)[0], int(label), "image") for label in labels]
        metadata = replace(METADATA, classes=classes)
        return write(raw, metadata, test_fraction=fraction, note=notes.append)

    written([50, 50], ["a", "b"], 0.2)
    assert notes == []
    common = "The split test has no image of the "
    written([190, 1], None, 0.02)
    assert notes == [f"{common}class 1 (1 image)."]
    data = written([2] * 12 + [300], [f"c{k}" for k in range(13)], 0.03)
    (note,) = notes
    there = np.unique(labels_of(data.read("test")))
    absent = [f"c{k} (2 images)" for k in range(13) if k not in there]
    assert len(absent) == 11
    assert note == f"{common}11 classes {', '.join(absent[:10])}, and 1 more."


def test_origins_follow_their_images(write: Write) -> None:
    pixels = images(2500)
    raw = (replace(r, origin=f"é/{n}.png") for n, r in enumerate(raw_images(pixels)))
    data = write(raw, test_fraction=0.2)
    assert data.info.origins
    for split in ("train", "test"):
        rows = data.read(split, origins=True)
        assert rows.origin is not None
        assert rows.origin.tolist() == [f"é/{number}.png" for number in rows.id]
        assert np.array_equal(rows.image, pixels[rows.id])
        some = rows.take(slice(7, 9)).origin
        assert some is not None
        assert some.tolist() == rows.origin[7:9].tolist()
    assert data.read("train").origin is None
    for origin, stored in {
        "\udcff.png": "\\udcff.png",
        "https://me:pw@host/1 a.png?token=key#x": "https://host/1 a.png",
    }.items():
        data = write([replace(next(raw_images(images(1))), origin=origin)])
        assert list(data.read("train", origins=True).origin or ()) == [stored]
    assert write(raw_images(images(2))).read("train", origins=True).origin is None


@pytest.mark.parametrize(("side", "encoding"), [(64, "raw"), (68, "png")])
def test_larger_images_are_encoded_in_larger_files(
    write: Write, monkeypatch: pytest.MonkeyPatch, side: int, encoding: str
) -> None:
    monkeypatch.setattr(writer, "GROUPS_PER_SHARD", 1)
    monkeypatch.setattr(writer, "SHARD_BYTES", 2_300_000)
    pixels = images(500, side, 3)
    data = write(raw_images(pixels))
    info = data.info
    assert info.encoding == encoding
    shards, groups = info.splits["train"].shards, -(-500 // info.row_group)
    assert len(shards) == (groups if encoding == "raw" else 3)  # 500 × 14 kB
    sizes = [group.rows for group in data.row_groups("train")]
    assert sizes[:-1] == [info.row_group] * (groups - 1)
    rows = data.read("train")
    assert np.array_equal(rows.image, pixels[rows.id])


def test_broken_images_do_not_stay_in_memory(write: Write) -> None:
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

    write(broken(), skip_broken=True)
    assert len(contents) == 3


def test_unlabelled_images_are_kept_and_held_out_like_a_class(write: Write) -> None:
    pixels = images(200)
    labels = [None if k % 2 else k // 2 % 2 for k in range(200)]
    raw = [RawImage(image, label, "x") for image, label in zip(pixels, labels, strict=True)]
    data = write(raw, test_fraction=0.2)
    info = data.info
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
    table = pq.read_table(Path(data.location) / info.splits["train"].shards[0].file)
    assert table["label"].null_count == 80
    assert data.class_names() == ["0", "1"]
    assert data.class_counts("train") == [40, 40]
    assert data.only_label("train") is None
    assert info.splits["train"].label_counts == {0: 40, 1: 40}
    record = info.splits["train"].model_copy(update={"label_counts": None})  # of an older version
    older = replace(data, info=info.model_copy(update={"splits": {"train": record}}))
    assert older.class_counts("train") == [40, 40]
    assert older.only_label("train") is None


def test_a_split_may_have_no_label(write: Write) -> None:
    data = write({"train": raw_images(images(9), True), "test": raw_images(images(8))})
    assert (data.info.labelled_rows("train"), data.info.labelled_rows("test")) == (9, 0)
    assert labels_of(data.read("test")).tolist() == [UNLABELLED] * 8
    assert data.read("test").labelled().label is None
    assert data.class_names() == ["0", "1", "2"]
    assert data.class_counts("test") == [0, 0, 0]


def test_names_of_classes_that_no_image_has_are_left_out(write: Write) -> None:
    info = write(raw_images(images(9)), replace(METADATA, classes=["a", "b"])).info
    assert (info.labelled, info.classes) == (False, None)


def test_few_images_have_no_validation_split_by_default(write: Write) -> None:
    info = write(raw_images(images(90)), validation_fraction=None).info
    assert list(info.splits) == ["train"]


def test_a_large_test_split_leaves_images_for_training(write: Write) -> None:
    info = write(raw_images(images(100)), validation_fraction=None, test_fraction=0.9).info
    assert {split: part.rows for split, part in info.splits.items()} == {"train": 10, "test": 90}


@pytest.mark.parametrize("fraction", [0.01, 0.99])
def test_empty_held_out_split_is_refused(tmp_path: Path, write: Write, fraction: float) -> None:
    with pytest.raises(UserError, match=" of 4 images leaves a split empty"):
        write(raw_images(images(4)), test_fraction=fraction)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("split", ["validation", "test"])
def test_holding_out_beside_such_a_split_is_refused(write: Write, split: str) -> None:
    splits = {"train": raw_images(images(4)), split: raw_images(images(4))}
    with pytest.raises(UserError, match=f"a {split} split of its own: leave --{split}-fraction"):
        write(splits, **{f"{split}_fraction": 0.5})


def bad(image: np.ndarray, label: int | None = None) -> dict[str, Iterable[RawImage]]:
    return {"train": raw_images(images(3)), "test": [RawImage(image, label, "bad.png")]}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        (bad(images(1, 30)[0]), "bad.png is 30 × 30 and image 0 is 28 × 28: add `--size N`"),
        (bad(images(1, 28, 3)[0]), "bad.png is in colour and image 0 is grey: add `--color grey`"),
        ({"train": raw_images(images(1, 15))}, "image 0 is 15 × 15, and sides are 16 to 256: add"),
        (bad(images(1)[0], -1), "bad.png has the label -1, but classes are 0 to 1: leave"),
        (bad(images(1)[0], 2), "bad.png has the label 2, but classes are 0 to 1: leave"),
        ({"train": raw_images(images(3)), "test": []}, "no image in the split test"),
    ],
)
def test_images_that_do_not_fit_are_refused(
    tmp_path: Path, write: Write, splits: dict[str, Iterable[RawImage]], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        write(splits, replace(METADATA, classes=["a", "b"]))
    assert os.listdir(tmp_path) == []


def test_existing_folder_is_kept_unless_overwritten(tmp_path: Path, write: Write) -> None:
    data = write(raw_images(images(3)))
    with pytest.raises(UserError, match=f"{data.location} exists already: .*--overwrite"):
        write(raw_images(images(5)), overwrite=False)

    def failing() -> Iterator[RawImage]:
        yield from raw_images(images(5))
        raise UserError("no more")

    with pytest.raises(UserError, match="no more"):
        write(failing())
    assert len(data.read("train").id) == 3
    assert len(write(raw_images(images(5))).read("train").id) == 5
    assert os.listdir(tmp_path) == ["set"]


def test_old_data_comes_back_if_the_new_cannot_take_its_place(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write(raw_images(images(3)))
    rename = os.rename

    def failing(old: str, new: str) -> None:
        if old.endswith("/new"):
            raise PermissionError("no")
        rename(old, new)

    monkeypatch.setattr(os, "rename", failing)
    with pytest.raises(UserError, match=f"{data.location} cannot be written: no"):
        write(raw_images(images(5)))
    assert len(data.read("train").id) == 3
    assert os.listdir(tmp_path) == ["set"]


def test_a_mount_point_stays_and_has_the_new_data(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container's volume cannot be renamed."""
    write(raw_images(images(3)))
    folder, is_mount = tmp_path / "set", os.path.ismount
    before = folder.stat().st_ino
    monkeypatch.setattr(os.path, "ismount", lambda path: path == str(folder) or is_mount(path))
    assert len(write(raw_images(images(5))).read("train").id) == 5
    assert folder.stat().st_ino == before
    assert os.listdir(tmp_path) == ["set"]


@pytest.mark.parametrize(("moved", "rows"), [("set", 3), ("new", 5)])
def test_an_interrupt_leaves_the_old_data_or_the_new(
    moved: str, rows: int, tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(raw_images(images(3)))
    rename = os.rename

    def interrupted(old: str, new: str) -> None:
        rename(old, new)
        if Path(old).name == moved:
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(raw_images(images(5)))
    assert len(Dataset.open(str(tmp_path / "set")).read("train").id) == rows
    assert os.listdir(tmp_path) == ["set"]


def test_all_is_on_the_disk_before_it_takes_its_place(
    tmp_path: Path, write: Write, disk_calls: list[tuple[str, str]]
) -> None:
    out = write(raw_images(images(50))).location
    moved = disk_calls.index(("rename", str(out)))
    synced = {Path(path).name for call, path in disk_calls[:moved] if call == "sync"}
    assert synced == {"new", *os.listdir(out)}
    assert disk_calls[moved + 1 :] == [("sync", str(tmp_path))]


def test_work_is_done_hidden_beside_the_target(tmp_path: Path, write: Write) -> None:
    seen: list[list[str]] = []
    write(raw_images(images(3)), progress=lambda *_: seen.append(os.listdir(tmp_path)))
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
        write_splits({"train": raw_images(images(3))}, f"{tmp_path}/thesis.tex/set", METADATA)
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
        progress=lambda *_: seen.append(record.exists()),
    )
    # There while the source is read, gone before a shard is written, back at the end.
    assert seen == [True, False]
    assert sorted(os.listdir(folder)) == ["dataset.json", "train-00000-of-00001.parquet"]
    assert len(Dataset.open(out).read("train").id) == 3


@pytest.mark.parametrize(
    ("step", "place"),
    [
        ("encode_pixels", f"The temporary folder {gettempdir()} (TMPDIR names another)"),
        ("_write_shards", "s3://bucket/key/set"),
    ],
)
def test_the_full_one_of_two_storages_is_named(
    step: str, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError("No space left on device")

    bucket = pafs.SubTreeFileSystem(str(tmp_path), pafs.LocalFileSystem())
    monkeypatch.setattr(storage_module, "_connect", lambda location: (bucket, "key/set"))
    monkeypatch.setattr(writer, step, full)
    message = re.escape(f"{place} cannot be written: No space left on device.")
    with pytest.raises(UserError, match=f"^{message}$"):
        write_splits({"train": raw_images(images(3))}, "s3://bucket/key/set", METADATA)
