"""metrics.jsonl: cut, damaged and killed in the middle of writing; in parts on an object store."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import wait_for

from cl_ray.errors import UserError
from cl_ray.metrics_file import PART_EPOCHS, MetricsFile, read_epochs
from cl_ray.storage import RunStorage


def write_lines(folder: RunStorage, epochs: int) -> MetricsFile:
    """Write so many epochs, the odd ones with an evaluation that came an epoch later."""
    file = MetricsFile(folder, epochs)
    for epoch in range(1, epochs + 1):
        file.add(epoch, 10 * epoch, {"g/reconstruction": 1 / epoch, "seconds": 2.0})
        if epoch % 2 == 0:
            file.add(epoch - 1, 10 * (epoch - 1), {"evaluation/frechet": 3.0})
    return file


@pytest.fixture
def folder(tmp_path: Path) -> RunStorage:
    folder = RunStorage.at(str(tmp_path), "demo")
    write_lines(folder, 3)
    return folder


def text(folder: RunStorage) -> bytes:
    return folder.read("metrics.jsonl") or b""


def test_a_line_an_epoch(folder: RunStorage) -> None:
    lines = [json.loads(line) for line in text(folder).splitlines()]
    assert lines == read_epochs(folder)
    assert [line["epoch"] for line in lines] == [1, 2, 3]
    assert [line.get("evaluation/frechet") for line in lines] == [3.0, None, None]


def test_a_line_is_appended_and_the_rest_not_written_again(folder: RunStorage) -> None:
    path = Path(folder.uri, "metrics.jsonl")
    file, before = MetricsFile(folder, 3), path.stat().st_ino
    file.add(4, 40, {})
    assert path.stat().st_ino == before
    file.add(4, 40, {"evaluation/frechet": 2.0})  # a changed line replaces the file at once
    assert path.stat().st_ino != before
    assert [line["epoch"] for line in read_epochs(folder)] == [1, 2, 3, 4]


ZEROS = b"\0" * 700
CUT = {
    "a part": lambda blob: blob[:-20],
    "a part, then zeros": lambda blob: blob[:-20] + ZEROS,
    "zeros": lambda blob: blob.rsplit(b"\n", 2)[0] + b"\n" + ZEROS,
    "half a character": lambda blob: blob[:-20] + b"\xc3",
    "of other content": lambda blob: blob.rsplit(b"\n", 2)[0] + b'\n{"epoch": 3}\n',
}


@pytest.mark.parametrize("kind", CUT)
def test_a_cut_last_line_is_left_out_with_a_note_and_written_again(
    folder: RunStorage, kind: str
) -> None:
    whole = text(folder)
    folder.write("metrics.jsonl", CUT[kind](whole))
    notes: list[str] = []
    assert [line["epoch"] for line in read_epochs(folder, notes.append)] == [1, 2]
    where = f"line 3 of {folder}/metrics.jsonl"
    assert notes == [f"The last line, {where}, is incomplete and left out."]
    file = MetricsFile(folder, 3, notes.append)
    assert text(folder) == b"".join(whole.splitlines(keepends=True)[:2])
    file.add(3, 30, {"g/reconstruction": 1 / 3, "seconds": 2.0})
    assert text(folder) == whole


@pytest.mark.parametrize("end", [b"", ZEROS])
def test_a_whole_line_counts_without_its_line_break(folder: RunStorage, end: bytes) -> None:
    whole = text(folder)
    folder.write("metrics.jsonl", whole[:-1] + end)
    assert len(read_epochs(folder, pytest.fail)) == 3
    MetricsFile(folder, 3).add(4, 40, {})
    assert text(folder).startswith(whole)
    assert [line["epoch"] for line in read_epochs(folder)] == [1, 2, 3, 4]


@pytest.mark.parametrize("line", [b'{"epoch": 2, "st', b"[]", b'{"epoch": 2}', ZEROS])
def test_another_broken_line_is_one_sentence(folder: RunStorage, line: bytes) -> None:
    first, _, last = text(folder).splitlines()
    folder.write("metrics.jsonl", b"\n".join([first, line, last, b""]))
    for read in (read_epochs, lambda folder: MetricsFile(folder, 3)):
        with pytest.raises(UserError) as caught:
            read(folder)
        assert str(caught.value) == (
            f"The run's log is damaged: line 2 of {folder}/metrics.jsonl is not a JSON object with "
            "epoch and step; correct or delete that line."
        )


def test_lines_of_unfinished_epochs_are_dropped(folder: RunStorage) -> None:
    MetricsFile(folder, 1)
    assert [line["epoch"] for line in read_epochs(folder)] == [1]
    MetricsFile(folder, 0)
    assert read_epochs(folder) == []


def add_lines(folder: RunStorage) -> None:
    file = MetricsFile(folder, 10**6)
    for epoch in range(len(file.lines) + 1, 10**6):
        file.add(epoch, epoch, {"note": "x" * 5000})
        file.add(epoch, epoch, {"evaluation/frechet": 1.0})


def kill_writer(folder: RunStorage, pause: float) -> None:
    """Kill a process that adds lines, so many seconds after the file has grown."""
    path = Path(folder.uri, "metrics.jsonl")
    before = path.stat().st_size
    process = multiprocessing.get_context("fork").Process(target=add_lines, args=(folder,))
    process.start()
    wait_for(lambda: path.stat().st_size > before, "a line", pause=0.001)
    process.join(pause)
    process.kill()
    process.join()


def test_killed_while_it_writes(folder: RunStorage) -> None:
    for pause in (0.01, 0.02, 0.03, 0.05, 0.08):
        kill_writer(folder, pause)
        epochs = [line["epoch"] for line in MetricsFile(folder, 10**6).lines]
        assert epochs == list(range(1, len(epochs) + 1))
    assert len(epochs) > 3


def test_on_an_object_store_the_lines_are_in_parts(bucket: Any, tmp_path: Path) -> None:
    folder = RunStorage.at(bucket.uri("parts"), "demo")
    epochs = 2 * PART_EPOCHS + 3
    write_lines(folder, epochs)
    files = bucket.files("parts/demo/")
    assert sorted(files) == ["metrics-00021.jsonl", "metrics-00041.jsonl", "metrics.jsonl"]
    assert [blob.count(b"\n") for _, blob in sorted(files.items())] == [20, 3, 20]
    lines = read_epochs(folder)
    assert [line["epoch"] for line in lines] == list(range(1, epochs + 1))
    local = RunStorage.at(str(tmp_path), "whole")
    write_lines(local, epochs)
    assert lines == read_epochs(local)

    # Resumed from an earlier epoch; and a copy on a local disk, where one file is enough.
    MetricsFile(folder, PART_EPOCHS + 2)
    files = bucket.files("parts/demo/")
    assert sorted(files) == ["metrics-00021.jsonl", "metrics.jsonl"]
    copy = RunStorage.at(str(tmp_path), "copy")
    for name, blob in files.items():
        copy.write(name, blob)
    assert read_epochs(copy) == read_epochs(folder)
    MetricsFile(copy, PART_EPOCHS + 1)
    assert os.listdir(copy.uri) == ["metrics.jsonl"]
    assert read_epochs(copy) == lines[: PART_EPOCHS + 1]


def test_a_long_file_on_an_object_store_is_taken_apart(bucket: Any) -> None:
    """As an earlier version wrote it."""
    folder = RunStorage.at(bucket.uri("long"), "demo")
    old = [{"epoch": epoch, "step": epoch} for epoch in range(1, 51)]
    folder.write("metrics.jsonl", "".join(f"{json.dumps(line)}\n" for line in old).encode())
    MetricsFile(folder, 50)
    assert sorted(bucket.files("long/demo/")) == [
        "metrics-00021.jsonl", "metrics-00041.jsonl", "metrics.jsonl",
    ]  # fmt: skip
    assert read_epochs(folder) == old
