"""Parquet files as sources, in all their forms, and how each is refused."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.datasets import labels_of
from helpers.random_images import Refused, WriteSource, pixels, png, rows_by_split, save

from cl_ray.data import labels as labels_module
from cl_ray.data import parquet_source
from cl_ray.data.dataset import UNLABELLED
from cl_ray.data.decoding import ImageLimits
from cl_ray.data.file_tree import FileTree


def nested(array: np.ndarray) -> pa.Array:
    """Returns [n, a, b, ...] as fixed-size lists of fixed-size lists of ..."""
    column = pa.array(array.reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pa.FixedSizeListArray.from_arrays(column, size)
    return column


def parquet(folder: Path, columns: Mapping[str, Any], name: str = "0.parquet") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(dict(columns)), folder / name, row_group_size=5)
    return folder


def tensor(array: np.ndarray) -> pa.Array:
    return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(array))


GREY, COLOR = pixels(12), pixels(12, 32, 32, 3)
FORMS: dict[str, tuple[np.ndarray, Callable[[], Any]]] = {
    "tensor": (COLOR, lambda: tensor(COLOR)),
    "tensor of rows and columns": (GREY, lambda: tensor(GREY)),
    "tensor of floats": (COLOR, lambda: tensor(COLOR.astype(np.float32) / 255)),
    "tensor of floats around 0": (GREY, lambda: tensor(GREY.astype(np.float32) / 127.5 - 1)),
    "channels first": (COLOR, lambda: tensor(COLOR.transpose(0, 3, 1, 2))),
    "flat list": (GREY, lambda: nested(GREY.reshape(12, -1))),
    "nested lists": (COLOR, lambda: nested(COLOR)),
    "lists of any length": (GREY, lambda: pa.array(list(GREY.reshape(12, -1)))),
    "wide integers": (GREY, lambda: pa.array(GREY.reshape(12, -1).astype(int).tolist())),
    "nested lists of any length": (COLOR, lambda: pa.array(COLOR.tolist())),
    "nested lists, channels first": (
        COLOR,
        lambda: pa.array(COLOR.transpose(0, 3, 1, 2).tolist()),
    ),
    "nested lists of doubles": (GREY, lambda: pa.array((GREY / 255).tolist())),
    "encoded": (COLOR, lambda: pa.array([png(image) for image in COLOR])),
    "hugging face": (
        GREY,
        lambda: pa.array(
            [{"bytes": png(image), "path": f"{k}.png"} for k, image in enumerate(GREY)]
        ),
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_parquet_forms(tmp_path: Path, write_source: WriteSource, form: str) -> None:
    stored, column = FORMS[form]
    parquet(tmp_path / "in", {"image": column(), "label": [k // 4 for k in range(12)]})
    info, rows = write_source(f"file://{tmp_path}/in")
    assert np.array_equal(rows.image, stored.reshape(12, *stored.shape[1:3], -1))
    assert labels_of(rows).tolist() == [k // 4 for k in range(12)]
    assert info.classes is None


def test_parquet_names_of_classes(tmp_path: Path, write_source: WriteSource) -> None:
    image = FORMS["hugging face"][1]()
    names = ["cat", "ant", "bee"] * 4
    text = parquet(tmp_path / "text", {"pic": image, "kind": names})
    info, rows = write_source(text, label_column="kind")
    assert info.classes == ["ant", "bee", "cat"]
    assert [info.classes[k] for k in labels_of(rows)] == names
    features = {"label": {"names": ["zero", "one", "two"], "_type": "ClassLabel"}}
    table = pa.table({"image": image, "label": [0, 1, 2] * 4}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub" / "0.parquet")
    assert write_source(tmp_path / "hub")[0].classes == ["zero", "one", "two"]
    assert write_source(tmp_path / "hub", label_column="none")[1].label is None


LABELS: dict[str, tuple[Any, list[str] | None, list[int]]] = {
    "floats of whole numbers": ([0.0, 1.0, 2.0] * 4, None, [0, 1, 2] * 4),
    "numbers with gaps": ([7, 1000000, -3] * 4, ["-3", "7", "1000000"], [1, 2, 0] * 4),
    "minus one and one": ([-1, 1] * 6, ["-1", "1"], [0, 1] * 6),
    "bytes": (pa.array([1, 0] * 6, pa.uint8()), None, [1, 0] * 6),
    "bools": ([True, False] * 6, ["false", "true"], [1, 0] * 6),
    "one bool": ([True] * 12, ["false", "true"], [1] * 12),
    "texts of numbers": (["10", "9"] * 6, ["10", "9"], [0, 1] * 6),
    "categories": (pa.array([5, 3] * 6).dictionary_encode(), ["3", "5"], [1, 0] * 6),
    "categories of texts": (pa.array(["b", "a"] * 6).dictionary_encode(), ["a", "b"], [1, 0] * 6),
}


@pytest.mark.parametrize("form", LABELS)
def test_parquet_labels(tmp_path: Path, write_source: WriteSource, form: str) -> None:
    column, classes, labels = LABELS[form]
    folder = parquet(tmp_path / "in", {"image": tensor(GREY), "kind": column})
    info, rows = write_source(folder, label_column="kind")
    assert (info.classes, labels_of(rows).tolist()) == (classes, labels)


@pytest.mark.parametrize(
    "column",
    [
        [0, None, 1] * 4,
        [0, -1, 1] * 4,
        [0.0, float("nan"), 1.0] * 4,
        pa.array(["a", None, "b"] * 4).dictionary_encode(),
    ],
    ids=["null", "minus one", "nan", "category"],
)
def test_images_without_a_label_are_kept(
    tmp_path: Path, write_source: WriteSource, notes: list[str], column: Any
) -> None:
    parquet(tmp_path / "in", {"image": tensor(GREY), "label": column})
    info, rows = write_source(tmp_path / "in")
    assert labels_of(rows).tolist() == [0, UNLABELLED, 1] * 4
    assert info.splits["train"].unlabelled == 4
    note = "The number -1 in the column label means an image without a label."
    assert (note in notes) == (-1 in column)
    copy, again = write_source(tmp_path / "made" / "set")
    assert copy.splits == info.splits
    assert labels_of(again).tolist() == labels_of(rows).tolist()
    info, rows = write_source(tmp_path / "in", unlabelled="drop")
    assert labels_of(rows).tolist() == [0, 1] * 4
    assert np.array_equal(rows.image[..., 0], GREY[np.arange(12) % 3 != 1])
    assert info.splits["train"].unlabelled == 0
    assert "Left out, having no label: 4 train." in notes


def test_dropping_a_whole_split_is_refused(tmp_path: Path, refused: Refused) -> None:
    for split, label in (("train", 1), ("test", -1)):
        labels = pa.array([label, 0 if split == "train" else -1])
        parquet(tmp_path / "in", {"image": tensor(GREY[:2]), "label": labels}, f"{split}.parquet")
    message = refused(tmp_path / "in", unlabelled="drop")
    assert "`--unlabelled drop` leaves no image in the split test, as none has a label" in message


def test_columns_that_could_be_labels_are_named(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    columns = {"image": tensor(GREY), "id": range(12), "all": [1] * 12, "weight": [0.5, 1.5] * 6}
    parquet(tmp_path / "in", {**columns, "fine": ["a", "b"] * 6, "coarse": [True, False] * 6})
    assert not write_source(tmp_path / "in")[0].labelled
    note = "No labels are read: the columns fine, coarse could be some; add `--label-column fine`."
    assert notes == [note]
    for column in ("none", "coarse"):
        write_source(tmp_path / "in", label_column=column)
        assert notes == []
    parquet(tmp_path / "in", columns)
    write_source(tmp_path / "in")
    assert notes == []


def test_folders_are_columns(tmp_path: Path, write_source: WriteSource, notes: list[str]) -> None:
    for k, kind in enumerate(("ant", "bee%3D", "__HIVE_DEFAULT_PARTITION__")):
        rows = tensor(GREY[4 * k : 4 * k + 4])
        parquet(tmp_path / "in" / f"year={2000 + k}" / f"kind={kind}", {"image": rows})
    info, _ = write_source(tmp_path / "in", label_column="year")
    assert info.classes == ["2000", "2001", "2002"]
    assert not write_source(tmp_path / "in")[0].labelled
    assert "the columns year, kind could be some" in notes[0]
    for split in ("train", "test"):
        for label in (0, 1):
            folder = tmp_path / "out" / f"split={split}" / f"label={label}"
            parquet(folder, {"image": tensor(GREY[6 * label : 6 * label + 6])})
    info, written = write_source(tmp_path / "out")
    assert (info.splits["train"].rows, info.splits["test"].rows, info.classes) == (12, 12, None)
    assert labels_of(written).tolist() == [0] * 6 + [1] * 6
    assert np.array_equal(written.image[..., 0], GREY)


def test_parquet_splits(tmp_path: Path, write_source: WriteSource, refused: Refused) -> None:
    image = FORMS["flat list"][1]()
    folder = tmp_path / "in" / "data"
    parquet(folder, {"image": image[:5]}, "train-00000-of-00002-abc.parquet")
    parquet(folder, {"image": image[5:8]}, "train-00001-of-00002-abc.parquet")
    parquet(folder, {"image": image[8:]}, "validation-00000-of-00001.parquet")
    info, rows = write_source(tmp_path / "in")
    assert rows_by_split(info) == {
        "train": 8,
        "validation": 4,
    }
    assert np.array_equal(rows.image[..., 0], GREY[:8])
    parquet(folder, {"image": image}, "more.parquet")
    assert "data/more.parquet names none" in refused(tmp_path / "in")
    assert len(write_source(tmp_path / "in", splits="none")[1].image) == 24
    parquet(tmp_path / "capital", {"image": image[:8]}, "TRAINING.PARQUET")
    parquet(tmp_path / "capital", {"image": image[8:]}, "dev.parquet")
    assert list(write_source(tmp_path / "capital")[0].splits) == ["train", "validation"]
    test_only = parquet(tmp_path / "test-only", {"image": image}, "test.parquet")
    assert "has no training split but only test" in refused(test_only)


def test_parquet_refused(tmp_path: Path, refused: Refused) -> None:
    image = FORMS["flat list"][1]()
    encoded = FORMS["encoded"][1]()

    def told(columns: Mapping[str, Any], **flags: Any) -> str:
        parquet(tmp_path / "in", columns)
        message = refused(tmp_path / "in", **flags)
        assert f"{tmp_path}/in/0.parquet" in message
        return message

    nowhere = {"x": [1, 2], "y": ["a", "b"]}
    assert "no columns that can be images" in told(nowhere)
    assert "it has x (int64), y (" in told(nowhere)
    assert "holds int64 in its column image" in told({"image": [1, 2]})
    assert "2 columns that can be images" in told({"left": image, "right": image})
    assert "has no column pic" in told({"image": image}, image_column="pic")
    assert "has no column kind" in told({"image": image}, label_column="kind")
    assert "row 0, holds 99 numbers, which are the pixels of no square" in told(
        {"image": nested(pixels(2, 99))}
    )
    assert "row 0, holds numbers of shape 28 × 28 × 4" in told(
        {"image": nested(pixels(2, 28, 28, 4))}
    )
    assert "row 0, is not one image: its lists are empty or differ" in told({"image": [[], [1]]})
    uneven = pixels(2).tolist()
    uneven[1][3].append(0)
    assert "row 1, is not one image" in told({"image": uneven})
    assert "holds double in its column label" in told({"image": image, "label": [0.5] * 12})
    missing = encoded.to_pylist()
    missing[7] = None
    assert "row 7, has no image" in told({"image": pa.array(missing)})
    holed = pa.FixedSizeListArray.from_arrays(pa.array([1] * 784 + [None] * 784, pa.uint8()), 784)
    assert "row 1, has a pixel missing" in told({"image": holed})
    bare = pa.array(
        [{"bytes": None, "path": None}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    assert "row 0, has no image" in told({"image": bare})
    missing[7] = b"no image"
    assert "row 7, cannot be read as an image" in told({"image": pa.array(missing)})
    (tmp_path / "in" / "0.parquet").write_bytes(b"PAR1 and no more")
    assert "0.parquet is damaged" in refused(tmp_path / "in")


def test_parquet_files_that_differ_are_refused(tmp_path: Path, refused: Refused) -> None:
    image = FORMS["flat list"][1]()
    parquet(tmp_path / "in", {"image": image, "label": [0] * 12})
    parquet(tmp_path / "in", {"image": image}, "1.parquet")
    assert "1.parquet has no column label" in refused(tmp_path / "in")
    parquet(tmp_path / "in", {"image": ["x", "y"], "label": [0] * 2}, "1.parquet")
    assert "1.parquet, row 0, names the file x" in refused(tmp_path / "in")
    parquet(tmp_path / "in", {"image": [0.5], "label": [0]}, "1.parquet")
    assert "1.parquet holds double in its column image" in refused(tmp_path / "in")


def test_numbers_out_of_range_are_refused_by_row(tmp_path: Path, refused: Refused) -> None:
    whole = GREY.astype(np.int64)
    whole[7, 3, 3] = 300
    folder = parquet(tmp_path / "whole", {"image": whole.reshape(12, -1).tolist()})
    assert "row 7, holds numbers from 0 to 300" in refused(folder)
    for name, value in (("high", 1.5), ("low", -1.5), ("nan", np.nan)):
        floats = GREY / 255
        floats[7, 3, 3] = value
        message = refused(parquet(tmp_path / name, {"image": tensor(floats)}))
        assert "row 7, holds floats from" in message
        assert "from 0 to 1 or from -1 to 1" in message


def test_range_of_floats_is_found_in_all_files(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    """The first file alone would be taken for 0 to 1."""
    stored = np.concatenate([np.maximum(GREY[:6], 128), GREY[6:]])
    floats = stored / 127.5 - 1
    parquet(tmp_path / "in", {"image": tensor(floats[:6])}, "0.parquet")
    parquet(tmp_path / "in", {"image": tensor(floats[6:])}, "1.parquet")
    _, rows = write_source(tmp_path / "in")
    assert np.array_equal(rows.image[..., 0], stored)
    assert "Floats from -1 to 1 are scaled to pixels from 0 to 255." in notes


def test_order_of_flat_colour_is_named(
    tmp_path: Path, write_source: WriteSource, refused: Refused
) -> None:
    for order, flat in (("last", COLOR), ("first", COLOR.transpose(0, 3, 1, 2))):
        folder = parquet(tmp_path / order, {"image": list(flat.reshape(12, -1))})
        assert np.array_equal(write_source(folder, channels=order)[1].image, COLOR)
        assert "row 0, holds a colour image as a flat list: add `--channels" in refused(folder)


def test_paths_are_relative_to_the_table_or_the_source(
    tmp_path: Path, write_source: WriteSource, refused: Refused
) -> None:
    for k, image in enumerate(GREY):
        folder = ("in/data/pictures", "in/pictures", "in/beside")[k % 3]
        save(tmp_path / folder / f"{k}.png", image)
    paths = [("pictures", "pictures", "../beside")[k % 3] + f"/{k}.png" for k in range(12)]
    cells = pa.array([{"bytes": None, "path": path} for path in paths])
    parquet(tmp_path / "in" / "data", {"image": cells})
    assert "holds both beside/11.png and" in refused(tmp_path / "in")
    assert np.array_equal(
        write_source(tmp_path / "in", image_column="image")[1].image[..., 0], GREY
    )
    parquet(tmp_path / "in" / "data", {"file": paths})
    uri = f"file://{tmp_path}/in"
    assert np.array_equal(write_source(uri, image_column="file")[1].image[..., 0], GREY)
    (tmp_path / "in" / "beside" / "5.png").rename(tmp_path / "5.png")
    message = refused(tmp_path / "in", image_column="file")
    assert "row 5, names the file ../beside/5.png, and there is none at" in message
    for path in (str(tmp_path / "5.png"), "../../5.png"):
        parquet(tmp_path / "in" / "data", {"file": [*paths[:5], path, *paths[6:]]})
        message = refused(tmp_path / "in", image_column="file")
        assert f"row 5, names the file {path}, which is not in {tmp_path}/in" in message


def test_pixels_after_a_file_of_encoded_images(tmp_path: Path, write_source: WriteSource) -> None:
    images = [png(image) for image in COLOR]
    for number, column in enumerate((images, nested(COLOR.reshape(12, -1) / 127.5 - 1))):
        parquet(tmp_path / "in", {"image": column}, f"{number}.parquet")
    _, rows = write_source(tmp_path / "in", channels="last")
    assert np.array_equal(rows.image, np.tile(COLOR, (2, 1, 1, 1)))


def test_labels_of_every_row_are_refused_before_all_are_read(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(labels_module, "MAX_CLASSES", 3)
    monkeypatch.setattr(parquet_source, "_CHUNK", 6)
    column = np.arange(12.0)
    column[-1] = 0.5  # would be refused in the second half
    message = refused(parquet(tmp_path / "in", {"image": tensor(GREY), "label": column}))
    assert "holds more than 3 different values in its column label" in message


def test_reading_holds_some_rows_in_memory_and_not_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "_CHUNK_BYTES", 1_000_000)  # one row
    file, group = tmp_path / "large.parquet", np.random.default_rng(0).bytes(1_000_000)
    table = pa.table({"image": [group]})
    with pq.ParquetWriter(file, table.schema, compression="none", use_dictionary=False) as writer:
        for _ in range(300):
            writer.write_table(table)

    def anonymous_megabytes() -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("RssAnon:")[1].split()[0]) // 1000

    tree = FileTree(str(tmp_path), str(tmp_path), {}, lambda name: (tmp_path / name).open("rb"))
    folder = parquet_source._ParquetFolder(tree, ImageLimits())
    before = anonymous_megabytes()
    during = [anonymous_megabytes() for _ in folder.batches(file.name, "image")]
    assert len(during) == 300
    assert max(during) - before < 150
