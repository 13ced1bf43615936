"""A folder is claimed by one request, and no other file is ever touched."""

import json
from pathlib import Path

import numpy as np
import pandas  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cl_ray.errors import UserError
from cl_ray.inference.output import Output, folder_names

ASKED = {"verb": "generate", "seed": 0}


def a_part(label: bool) -> pa.Table:
    images = np.random.default_rng(0).integers(0, 255, (6, 28, 28, 1), np.uint8)
    columns = {"id": pa.array([3, 4, 5, 6, 7, 8])}
    if label:
        columns["label"] = pa.array([0, 1, 0, 1, 1, 1])
    return pa.table({**columns, "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images)})


def put(output: Output, part: int, made: pa.Table, names: list[str] | None = None) -> None:
    for name, blob in output.files(part, made, names):
        output.put(name, blob)


def test_a_folder_of_parquet_reads_as_one_table_at_every_moment(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "all of it.parquet"))
    assert not output.claim(ASKED, overwrite=False)
    assert output.missing(3) == [0, 1, 2]
    made = a_part(label=True)
    put(output, 1, made)
    half = tmp_path / "all of it.parquet" / "_parts" / "0123.new"
    half.write_bytes(b"cut sho")
    assert output.missing(3) == [0, 2]
    assert not output.claim(ASKED, overwrite=False)
    assert not half.exists()  # who goes on needs the room
    assert pq.read_table(output.location).equals(made)
    put(output, 0, made)
    put(output, 2, made)
    output.finish(ASKED)
    assert output.claim(ASKED, overwrite=False)
    assert pq.read_table(output.location).num_rows == 18
    frame = pandas.read_parquet(output.location)
    assert frame["label"].tolist() == 3 * [0, 1, 0, 1, 1, 1]
    names = sorted(p.name for p in Path(output.location).iterdir())
    assert names == ["_made.json", *(f"part-00000{n}.parquet" for n in range(3))]
    assert json.loads((tmp_path / "all of it.parquet" / "_made.json").read_text())["complete"]


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "digits.parquet"))
    output.claim(ASKED, overwrite=False)
    of_no_digits = pa.table({"id": [{}]}, schema=pa.schema({"id": pa.struct([])}))
    with pytest.raises(pa.ArrowException):
        output.put("part-000000.parquet", of_no_digits)
    there = sorted(p.name for p in Path(output.location).rglob("*"))
    assert there == ["_made.json", "_parts"]


def test_pictures_lie_in_a_folder_a_class(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "digits"))
    output.claim(ASKED, overwrite=False)
    made = a_part(label=True)
    files = output.files(0, made, folder_names(["cat", "T-shirt/top"]))
    for name, blob in files[:-1]:
        output.put(name, blob)
    assert output.missing(1) == [0]  # all its pictures, but nothing that says so
    output.put(*files[-1])
    assert output.missing(1) == []
    output.finish(ASKED)
    there = sorted(str(p.relative_to(output.location)) for p in Path(output.location).rglob("*.*"))
    tops = [f"T-shirt-top/{n:08d}.png" for n in (4, 6, 7, 8)]
    assert there == [*tops, "_made.json", "cat/00000003.png", "cat/00000005.png"]
    with Image.open(tmp_path / "digits" / "cat" / "00000005.png") as image:
        expected = made["image"].combine_chunks().to_numpy_ndarray()[2, ..., 0]
        assert np.array_equal(np.asarray(image), expected)


def test_names_of_folders() -> None:
    assert folder_names(["cat", "..", "_parts", "a b"]) == ["cat", "--", "-parts", "a b"]
    assert folder_names(["a/b", "a-b"]) is None
    assert folder_names(["Cat", "cat"]) is None  # one folder, where case is no matter
    assert folder_names(None) is None


def test_what_is_there_is_kept_unless_it_is_ours(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds thesis.txt, which this command did not write"):
            Output.at(str(mine)).claim(ASKED, overwrite)
    with pytest.raises(UserError, match=r"is a file"):
        Output.at(str(mine / "thesis.txt"))
    with pytest.raises(UserError, match=r"cannot be (read|written)"):
        Output.at(str(mine / "thesis.txt" / "below")).claim(ASKED, overwrite=False)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    assert (mine / "thesis.txt").read_text() == "precious"


def test_another_request_is_refused_with_the_difference(tmp_path: Path) -> None:
    output = Output.at(str(tmp_path / "digits"))
    output.claim(ASKED, overwrite=False)
    put(output, 0, a_part(label=True))
    other = {**ASKED, "seed": 1}
    with pytest.raises(UserError, match=r"another request made \(seed 0, now 1\).* --overwrite"):
        output.claim(other, overwrite=False)
    (tmp_path / "digits" / "0" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 0/notes.txt"):
        output.claim(other, overwrite=True)
    assert len(list((tmp_path / "digits" / "0").iterdir())) == 3
    (tmp_path / "digits" / "0" / "notes.txt").unlink()
    assert not output.claim(ASKED, overwrite=True)  # the same one goes on
    assert output.missing(2) == [1]
    assert not output.claim(other, overwrite=True)
    assert output.missing(2) == [0, 1]
    assert [p.name for p in (tmp_path / "digits").rglob("*.png")] == []
