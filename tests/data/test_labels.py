"""Labels of image files from tables beside them."""

import json
import tracemalloc
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import labels_of
from helpers.random_images import Refused, WriteSource, pixels, save

from cl_ray.data import labels as labels_module
from cl_ray.data.dataset import UNLABELLED


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Returns a folder with the images 0.png to 3.png."""
    for k, image in enumerate(pixels(4)):
        save(tmp_path / "in" / f"{k}.png", image)
    return tmp_path / "in"


TABLES = {
    "labels.csv": "file,label\n3.png,ant\n2.png,bee\n1.png,ant\n0.png,cat\n",
    "Labels.TSV": "Label\tFile Name\ncat\t0.png\nant\t1.png\nbee\t2.png\nant\t3.png\n",
    "train.csv": "\ufeffid;class\r\n0;cat\r\n1;ant\r\n2;bee\r\n3;ant\r\n",
    "x.csv": 'path,class\n"/a/0.png",cat\n"b\\1.png",ant\n./2.png,bee\nin/3.png," ant "\n',
    "metadata.jsonl": "".join(
        json.dumps({"file_name": f"{k}.png", "text": "x", "label": label}) + "\n"
        for k, label in enumerate(["cat", "ant", "bee", "ant"])
    ),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables_of_names(
    folder: Path, write_source: WriteSource, notes: list[str], name: str
) -> None:
    (folder / name).write_text(TABLES[name])
    info, rows = write_source(folder)
    assert info.classes == ["ant", "bee", "cat"]
    assert labels_of(rows).tolist() == [2, 0, 1, 0]
    (note,) = notes
    assert note.startswith(f"Labels are from {name}, columns ")
    assert write_source(folder, label_column="none")[1].label is None


def test_names_that_are_not_unicode(folder: Path, write_source: WriteSource) -> None:
    rows = [{"file_name": f"{k}.png", "label": chr(0xD800 + k % 2)} for k in range(4)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert write_source(folder)[0].classes == ["\\ud800", "\\ud801"]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "cp1252"])
def test_tables_of_excel(folder: Path, write_source: WriteSource, encoding: str) -> None:
    rows = "".join(f"{k}.png;Käfer {k % 2}\n" for k in range(4))
    (folder / "labels.csv").write_text(f"Filename;Label\n{rows}", encoding=encoding)
    assert write_source(folder)[0].classes == ["Käfer 0", "Käfer 1"]


@pytest.mark.parametrize(
    ("labels", "classes", "expected"),
    [
        (["2", "0", "10", "0"], ["0", "2", "10"], [1, 0, 2, 0]),
        (["1.0", "0.0", "1.0", "0.0"], None, [1, 0, 1, 0]),
        (["20000", "7", "7", "7"], ["7", "20000"], [1, 0, 0, 0]),
        (["1", "x", "1", "1"], ["1", "x"], [0, 1, 0, 0]),
        (["1", "0", "9" * 5000, "0"], ["0", "1", "9" * 5000], [1, 0, 2, 0]),
    ],
)
def test_numbers_are_classes(
    folder: Path, write_source: WriteSource, labels: list[str], classes: Any, expected: list[int]
) -> None:
    lines = [f"{k}.png,{label}\n" for k, label in enumerate(labels)]
    (folder / "labels.csv").write_text("".join(["image,y\n", *lines]))
    info, rows = write_source(folder)
    assert info.classes == classes
    assert labels_of(rows).tolist() == expected


def test_stylegan(tmp_path: Path, write_source: WriteSource, notes: list[str]) -> None:
    for k, image in enumerate(pixels(3)):
        save(tmp_path / "in" / "00000" / f"img{k}.png", image)
    record = tmp_path / "in" / "dataset.json"
    record.write_text(json.dumps({"labels": [[f"00000/img{k}.png", k % 2] for k in range(3)]}))
    info, rows = write_source(tmp_path / "in")
    assert info.classes is None
    assert labels_of(rows).tolist() == [0, 1, 0]
    record.write_text(json.dumps({"labels": None}))  # the folders are shards, not classes
    assert not write_source(tmp_path / "in")[0].labelled
    assert "Not used for labels: dataset.json says that there are no labels." in notes


@pytest.mark.parametrize("form", ["{stem}.json", "{stem}.png.json", "{stem}.cls"])
def test_files_beside_images_whose_names_have_dots(
    tmp_path: Path, write_source: WriteSource, form: str
) -> None:
    for k, image in enumerate(pixels(3)):
        save(tmp_path / "in" / f"img.00{k}.png", image)
        label = "ant" if k % 2 else "bee"
        text = label if form.endswith("cls") else json.dumps({"label": label})
        (tmp_path / "in" / form.format(stem=f"img.00{k}")).write_text(text)
    info, rows = write_source(tmp_path / "in")
    assert info.classes == ["ant", "bee"]
    assert labels_of(rows).tolist() == [1, 0, 1]


def test_nan_is_no_label(folder: Path, write_source: WriteSource) -> None:
    for text in ("NaN", '"nan"'):
        rows = [f'{{"file_name": "{k}.png", "label": {text if k == 1 else k}}}' for k in range(4)]
        (folder / "metadata.jsonl").write_text("\n".join(rows))
        info, rows_read = write_source(folder)
        assert info.classes == ["0", "2", "3"]
        assert labels_of(rows_read).tolist() == [0, UNLABELLED, 1, 2]


def test_names_of_macos(tmp_path: Path, write_source: WriteSource) -> None:
    """It writes an accent as a character of its own; a table may not."""
    for k, image in enumerate(pixels(2)):
        save(tmp_path / "in" / unicodedata.normalize("NFD", f"café{k}.png"), image)
    for names in ("café0.png,a\ncafé1.png,b\n", "café0,a\ncafé1,b\n"):
        (tmp_path / "in" / "labels.csv").write_text(f"file,label\n{names}")
        assert write_source(tmp_path / "in")[0].classes == ["a", "b"]


def test_a_form_for_answers_gives_no_labels(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    for split in ("train", "test"):
        for k, image in enumerate(pixels(3)):
            save(tmp_path / "in" / split / f"{split}{k}.png", image)
    (tmp_path / "in" / "train.csv").write_text("id,label\ntrain0,a\ntrain1,b\ntrain2,a\n")
    lines = "".join(f"test{k},a\n" for k in range(3))
    (tmp_path / "in" / "sample_submission.csv").write_text(f"id,label\n{lines}")
    info, _ = write_source(tmp_path / "in")
    assert [info.labelled_rows(split) for split in ("train", "test")] == [3, 0]
    assert "Not used for labels: sample_submission.csv is a form for answers, by its name." in notes


def test_a_table_in_every_split(tmp_path: Path, write_source: WriteSource) -> None:
    for split in ("train", "test"):
        lines = [json.dumps({"file_name": f"a/{k}.png", "label": "xy"[k]}) for k in range(2)]
        for k, image in enumerate(pixels(2)):
            save(tmp_path / "in" / split / "a" / f"{k}.png", image)
        (tmp_path / "in" / split / "metadata.jsonl").write_text("\n".join(lines))
    info, rows = write_source(tmp_path / "in")
    assert list(info.splits) == ["train", "test"]
    assert info.classes == ["x", "y"]
    assert labels_of(rows).tolist() == [0, 1]


def test_a_table_goes_before_folders(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    for k, image in enumerate(pixels(4)):
        save(tmp_path / "in" / "ab"[k % 2] / f"{k}.png", image)
    (tmp_path / "in" / "labels.csv").write_text("file,label\n0,x\n1,x\n2,y\n3,y\n9,z\n")
    info, rows = write_source(tmp_path / "in")
    assert info.classes == ["x", "y"]
    assert labels_of(rows).tolist() == [0, 1, 0, 1]
    assert "Not used for labels: 1 row of labels.csv, without an image (9)." in notes
    assert "Not used for labels: the folders (a, b)." in notes


def test_columns_by_flag(folder: Path, write_source: WriteSource, refused: Refused) -> None:
    rows = "".join(f"{k},{k % 2},q{k % 3}\n" for k in range(4))
    (folder / "x.csv").write_text("nr,label,kind\n" + rows)
    info, _ = write_source(folder, file_column="nr", label_column="kind")
    assert info.classes == ["q0", "q1", "q2"]
    message = refused(folder, label_column="sort")
    assert "has no table with --label-column sort (x.csv has no file column of" in message
    message = refused(folder, file_column="number")
    assert "x.csv has no column number but nr, label, kind" in message


def test_tables_without_labels_are_named(
    folder: Path, write_source: WriteSource, notes: list[str]
) -> None:
    (folder / "a.csv").write_text("file,text\n0.png,a cat\n")
    (folder / "b.csv").write_text("file,label\n7.png,x\n8.png,y\n")
    (folder / "c.jsonl").write_text("[1, 2]\n")
    (folder / "d.csv").write_bytes(b"\xff\xfe\0file")
    (folder / "e.csv").write_text("file,label\n")
    assert write_source(folder)[1].label is None
    printed = "\n".join(notes)
    assert "Not used for labels: a.csv has no label column of a usual name but file, te" in printed
    assert "Not used for labels: b.csv names none of the images, but '7.png'." in printed
    for name in ("c.jsonl is no such table (", "d.csv is no such table (", "e.csv has no rows."):
        assert f"Not used for labels: {name}" in printed


def test_labels_refused(folder: Path, refused: Refused) -> None:
    table = folder / "labels.csv"
    table.write_text("file,label\n0.png,a\n0.png,b\n")
    assert "labels.csv gives 0.png the labels a and b: keep one, or" in refused(folder)
    table.write_text("file,label\n" + "".join(f"{k}.png,a\n" for k in range(4)))
    (folder / "more.csv").write_text("file,label\n2.png,b\n")
    assert "2.png has the labels a and b (in more.csv)" in refused(folder)
    (folder / "more.csv").unlink()
    table.unlink()
    (folder / "metadata.jsonl").write_text('{"file_name": "0.png", "label": [1, 2]}\n')
    assert "metadata.jsonl has the label [1, 2] for 0.png, which is no class" in refused(folder)


@pytest.mark.parametrize("missing", ["", "-1", None])
def test_images_without_a_label_are_kept(
    folder: Path, write_source: WriteSource, notes: list[str], missing: str | None
) -> None:
    rows = ["3.png,1\n", "0.png,0\n", *([] if missing is None else [f"2.png,{missing}\n"])]
    (folder / "labels.csv").write_text("".join(["file,label\n", *rows]))
    info, batch = write_source(folder)
    assert labels_of(batch).tolist() == [0, UNLABELLED, UNLABELLED, 1]
    assert info.splits["train"].unlabelled == 2
    if missing == "-1":
        assert "1 of 4 images has no label: 1.png." in notes
        assert "The number -1 in the labels means an image without a label." in notes
    else:
        assert "2 of 4 images have no label: 1.png, 2.png." in notes


def test_more_labels_than_classes_can_be(
    folder: Path, monkeypatch: pytest.MonkeyPatch, refused: Refused
) -> None:
    monkeypatch.setattr(labels_module, "MAX_CLASSES", 3)
    (folder / "x.csv").write_text("file,label\n" + "".join(f"{k}.png,{k}\n" for k in range(4)))
    message = refused(folder)
    assert "holds more than 3 different values in the labels beside its images" in message


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_columns_without_labels_take_no_memory(
    folder: Path, write_source: WriteSource, kind: str
) -> None:
    columns = {"file_name": "0.png", "label": "a"} | {f"c{k}": "x" * 20 for k in range(50)}
    row = ",".join(columns.values()) if kind == "csv" else json.dumps(columns)
    text = "\n".join([",".join(columns), *[row] * 5000] if kind == "csv" else [row] * 5000)
    (folder / f"x.{kind}").write_text(text)
    tracemalloc.start()
    assert write_source(folder)[0].classes == ["a"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 3 * len(text)


def test_names_in_several_folders_are_not_guessed(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    for name in ("a/1.png", "b/1.png", "a/2.png"):
        save(tmp_path / "in" / name, pixels(1)[0])
    (tmp_path / "in" / "labels.csv").write_text("file,label\n1.png,x\n2.png,y\n")
    _, rows = write_source(tmp_path / "in")
    assert labels_of(rows).tolist() == [UNLABELLED, 0, UNLABELLED]
    assert "Not used for labels: 1 row of labels.csv, without an image (1.png)." in notes
    assert "2 of 3 images have no label: a/1.png, b/1.png." in notes
