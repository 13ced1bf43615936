"""Parquet as a source, in all its forms, and how each is refused."""

import io
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.datasets import labels_of
from helpers.random_images import WriteSource, pixels
from PIL import Image


def png(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


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


GREY, COLOR = pixels(12), pixels(12, 32, 32, 3)
FORMS: dict[str, tuple[np.ndarray, Callable[[], Any]]] = {
    "tensor": (COLOR, lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(COLOR)),
    "tensor of rows and columns": (GREY, lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(GREY)),
    "channels first": (
        COLOR,
        lambda: pa.FixedShapeTensorArray.from_numpy_ndarray(
            np.ascontiguousarray(COLOR.transpose(0, 3, 1, 2))
        ),
    ),
    "flat list": (GREY, lambda: nested(GREY.reshape(12, -1))),
    "flat list in colour": (COLOR, lambda: nested(COLOR.reshape(12, -1))),
    "nested lists": (COLOR, lambda: nested(COLOR)),
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
    parquet(tmp_path / "text", {"pic": image, "kind": names})
    info, rows = write_source(tmp_path / "text", label_column="kind")
    assert info.classes == ["ant", "bee", "cat"]
    assert [info.classes[k] for k in labels_of(rows)] == names
    parquet(tmp_path / "category", {"pic": image, "label": pa.array(names).dictionary_encode()})
    assert write_source(tmp_path / "category")[0].classes == ["ant", "bee", "cat"]
    features = {"label": {"names": ["zero", "one", "two"], "_type": "ClassLabel"}}
    table = pa.table({"image": image, "label": [0, 1, 2] * 4}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    (tmp_path / "hub").mkdir()
    pq.write_table(table, tmp_path / "hub" / "0.parquet")
    assert write_source(tmp_path / "hub")[0].classes == ["zero", "one", "two"]
    assert write_source(tmp_path / "hub", label_column="none")[1].label is None


def test_parquet_splits(
    tmp_path: Path, write_source: WriteSource, refused: Callable[..., str]
) -> None:
    image = FORMS["flat list"][1]()
    folder = tmp_path / "in" / "data"
    parquet(folder, {"image": image[:5]}, "train-00000-of-00002-abc.parquet")
    parquet(folder, {"image": image[5:8]}, "train-00001-of-00002-abc.parquet")
    parquet(folder, {"image": image[8:]}, "validation-00000-of-00001.parquet")
    info, rows = write_source(tmp_path / "in")
    assert {split: part.rows for split, part in info.splits.items()} == {
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
    parquet(tmp_path / "test-only", {"image": image}, "test.parquet")
    assert "has no training split but only test" in refused(tmp_path / "test-only")


def test_parquet_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    image = FORMS["flat list"][1]()
    encoded = FORMS["encoded"][1]()

    def told(columns: Mapping[str, Any], **flags: Any) -> str:
        parquet(tmp_path / "in", columns)
        message = refused(tmp_path / "in", **flags)
        assert f"{tmp_path}/in/0.parquet" in message
        return message

    floats = nested(np.full((2, 784), np.nan, np.float32))
    assert "holds fixed_size_list<element: float>[784] in its column image" in told(
        {"image": floats}
    )
    assert "no columns that can be images" in told({"x": [1, 2], "y": floats})
    assert "it has x (int64), y (" in told({"x": [1, 2], "y": floats})
    assert "2 columns that can be images" in told({"left": image, "right": image})
    assert "has no column pic" in told({"image": image}, image_column="pic")
    assert "has no column kind" in told({"image": image}, label_column="kind")
    assert "in its column image" in told({"image": nested(pixels(2, 99))})  # not a square
    assert "holds double in its column label" in told({"image": image, "label": [0.5] * 12})
    message = told({"image": image, "label": [0, 1, None] + [0] * 9})
    assert "0.parquet, row 2, has no label but" in message
    assert "--label-column none" in message
    assert "row 11, has the label -1" in told({"image": image, "label": [0] * 11 + [-1]})
    missing = encoded.to_pylist()
    missing[7] = None
    assert "row 7, has no image" in told({"image": pa.array(missing)})
    holed = pa.FixedSizeListArray.from_arrays(pa.array([1] * 784 + [None] * 784, pa.uint8()), 784)
    assert "row 1, has a pixel missing" in told({"image": holed})
    bare = pa.array(
        [{"bytes": None, "path": "a.png"}], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    assert "row 0, has no image" in told({"image": bare})
    missing[7] = b"no image"
    assert "row 7, cannot be read as an image" in told({"image": pa.array(missing)})
    (tmp_path / "in" / "0.parquet").write_bytes(b"PAR1 and no more")
    assert "0.parquet is damaged" in refused(tmp_path / "in")


def test_parquet_files_that_differ_are_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
    image = FORMS["flat list"][1]()
    parquet(tmp_path / "in", {"image": image, "label": [0] * 12})
    parquet(tmp_path / "in", {"image": image}, "1.parquet")
    assert "1.parquet has no column label" in refused(tmp_path / "in")
    parquet(tmp_path / "in", {"image": nested(np.ones((2, 784))), "label": [0] * 2}, "1.parquet")
    assert "1.parquet holds fixed_size_list<element: double>" in refused(tmp_path / "in")
