"""metrics.jsonl: damaged, killed in the middle of writing, and on an object store."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
from helpers.processes import wait_for

from cl_ray.errors import UserError
from cl_ray.metrics_file import MetricsFile, read_epochs
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


def test_a_last_line_without_its_line_break_counts(folder: RunStorage) -> None:
    whole = text(folder)
    folder.write("metrics.jsonl", whole[:-1])
    MetricsFile(folder, 3).add(4, 40, {})
    assert text(folder).startswith(whole)
    assert [line["epoch"] for line in read_epochs(folder)] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "line", [b'{"epoch": 2, "st', b"[]", b'{"epoch": 2}', b"\0" * 700, b"\xc3"]
)
def test_a_broken_line_is_one_sentence(folder: RunStorage, line: bytes) -> None:
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


def test_on_an_object_store_they_are_the_same(bucket: Any, tmp_path: Path) -> None:
    remote, local = RunStorage.at(bucket.uri("log"), "demo"), RunStorage.at(str(tmp_path), "demo")
    for folder in (remote, local):
        write_lines(folder, 5)
    assert bucket.files("log/demo/") == {"metrics.jsonl": text(local)}
    assert read_epochs(remote) == read_epochs(local)
    MetricsFile(remote, 2)
    assert [line["epoch"] for line in read_epochs(remote)] == [1, 2]
