"""An output folder is claimed by one request, and no other file is ever touched."""

import io
import json
from pathlib import Path

import numpy as np
import pandas  # type: ignore[import-untyped]
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cl_ray.errors import UserError
from cl_ray.inference.output import OutputFolder, class_folder_names

REQUEST = {"task": "GenerateTask", "seed": 0}


def part_table(label: bool) -> pa.Table:
    images = np.random.default_rng(0).integers(0, 255, (6, 28, 28, 1), np.uint8)
    columns = {"id": pa.array([3, 4, 5, 6, 7, 8])}
    if label:
        columns["label"] = pa.array([0, 1, 0, 1, 1, 1])
    return pa.table({**columns, "image": pa.FixedShapeTensorArray.from_numpy_ndarray(images)})


def write_part(output: OutputFolder, part: int, table: pa.Table) -> None:
    for name, content in output.part_files(part, table, None):
        output.write(name, content)


def test_parquet_folder_reads_as_one_table_at_every_moment(tmp_path: Path) -> None:
    output = OutputFolder.resolve(str(tmp_path / "all of it.parquet"))
    assert not output.claim(REQUEST, overwrite=False)
    assert output.missing_parts(3) == [0, 1, 2]
    table = part_table(label=True)
    write_part(output, 1, table)
    half = Path(output.location) / "_parts" / "0123.tmp"
    half.write_bytes(b"cut sho")
    assert output.missing_parts(3) == [0, 2]
    assert not output.claim(REQUEST, overwrite=False)
    assert not half.exists()  # resuming may need the space
    assert pq.read_table(output.location).equals(table)
    write_part(output, 0, table)
    write_part(output, 2, table)
    output.finish(REQUEST)
    assert output.claim(REQUEST, overwrite=False)
    assert pq.read_table(output.location).num_rows == 18
    frame = pandas.read_parquet(output.location)
    assert frame["label"].tolist() == 3 * [0, 1, 0, 1, 1, 1]
    names = sorted(p.name for p in Path(output.location).iterdir())
    assert names == ["_manifest.json", *(f"part-00000{n}.parquet" for n in range(3))]
    assert json.loads((tmp_path / "all of it.parquet" / "_manifest.json").read_text())["complete"]


def test_failed_write_leaves_no_file(tmp_path: Path) -> None:
    output = OutputFolder.resolve(str(tmp_path / "digits.parquet"))
    output.claim(REQUEST, overwrite=False)
    not_parquet = pa.table({"id": [{}]}, schema=pa.schema({"id": pa.struct([])}))
    with pytest.raises(pa.ArrowException):
        output.write("part-000000.parquet", not_parquet)
    names = sorted(p.name for p in Path(output.location).rglob("*"))
    assert names == ["_manifest.json", "_parts"]


def test_png_files_are_in_class_folders(tmp_path: Path) -> None:
    output = OutputFolder.resolve(str(tmp_path / "digits"))
    output.claim(REQUEST, overwrite=False)
    table = part_table(label=True)
    files = output.part_files(0, table, class_folder_names(["cat", "T-shirt/top"]))
    for name, content in files[:-1]:
        output.write(name, content)
    assert output.missing_parts(1) == [0]  # all its images, but not the marker
    output.write(*files[-1])
    assert output.missing_parts(1) == []
    output.finish(REQUEST)
    names = sorted(str(p.relative_to(output.location)) for p in Path(output.location).rglob("*.*"))
    tops = [f"T-shirt-top/{n:08d}.png" for n in (4, 6, 7, 8)]
    assert names == [*tops, "_manifest.json", "cat/00000003.png", "cat/00000005.png"]
    with Image.open(tmp_path / "digits" / "cat" / "00000005.png") as image:
        expected = table["image"].combine_chunks().to_numpy_ndarray()[2, ..., 0]
        assert np.array_equal(np.asarray(image), expected)
        assert "Source" not in image.info


def test_png_files_say_what_they_were_made_of(tmp_path: Path) -> None:
    output = OutputFolder.resolve(str(tmp_path / "variants"))
    table = part_table(label=False)
    origins = pa.array([f"katze/ü{n}.jpg" for n in range(len(table))])
    for name, content in output.part_files(0, table.append_column("origin", origins), None):
        if name.endswith(".png") and isinstance(content, bytes):
            row = table["id"].to_pylist().index(int(Path(name).stem))
            with Image.open(io.BytesIO(content)) as image:
                assert image.info["Source"] == f"katze/ü{row}.jpg"


def test_class_folder_names() -> None:
    assert class_folder_names(["cat", "..", "_parts", "a b"]) == ["cat", "--", "-parts", "a b"]
    assert class_folder_names(["a/b", "a-b"]) is None
    assert class_folder_names(["Cat", "cat"]) is None  # one folder where case is ignored
    assert class_folder_names(None) is None


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"holds thesis.txt, which this command did not write"):
            OutputFolder.resolve(str(mine)).claim(REQUEST, overwrite)
    with pytest.raises(UserError, match=r"is a file"):
        OutputFolder.resolve(str(mine / "thesis.txt"))
    with pytest.raises(UserError, match=r"cannot be (read|written)"):
        OutputFolder.resolve(str(mine / "thesis.txt" / "below")).claim(REQUEST, overwrite=False)
    assert [p.name for p in mine.iterdir()] == ["thesis.txt"]
    assert (mine / "thesis.txt").read_text() == "precious"


def test_another_request_is_refused_with_the_difference(tmp_path: Path) -> None:
    output = OutputFolder.resolve(str(tmp_path / "digits"))
    output.claim(REQUEST, overwrite=False)
    write_part(output, 0, part_table(label=True))
    other = {**REQUEST, "seed": 1}
    difference = r"results of another request \(seed 0, now 1\).* --overwrite"
    with pytest.raises(UserError, match=difference):
        output.claim(other, overwrite=False)
    (tmp_path / "digits" / "0" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"holds 0/notes.txt"):
        output.claim(other, overwrite=True)
    assert len(list((tmp_path / "digits" / "0").iterdir())) == 3
    (tmp_path / "digits" / "0" / "notes.txt").unlink()
    assert not output.claim(REQUEST, overwrite=True)  # the same request resumes
    assert output.missing_parts(2) == [1]
    assert not output.claim(other, overwrite=True)
    assert output.missing_parts(2) == [0, 1]
    assert [p.name for p in (tmp_path / "digits").rglob("*.png")] == []
