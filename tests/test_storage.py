"""The run folder, on local disk and on S3 (moto's server, reached by pyarrow as MinIO is)."""

import os
import threading
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest

from cl_ray.errors import UserError, redact_credentials
from cl_ray.storage import RunStorage, StorageMirror, redact_uri


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, bucket: Any) -> str:
    return str(tmp_path / "runs") if request.param == "local" else bucket.uri(tmp_path.name)


def error_of(folder: RunStorage) -> str:
    with pytest.raises(UserError) as caught:
        folder.create()
    message = str(caught.value)
    assert "\n" not in message
    assert message.endswith(".")
    return message


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    for given, storage in (
        ("runs", f"{tmp_path}/runs"), ("/data/runs/", "/data/runs"), ("~/runs", "/home/me/runs"),
        ("file:///data/runs", "/data/runs"), ("s3://bucket/runs?region=x", "s3://bucket/runs?region=x"),
    ):  # fmt: skip
        folder = RunStorage.at(given, "demo")
        assert folder.storage == storage
        assert folder.remote == given.startswith("s3")


@pytest.mark.parametrize(
    ("storage", "uri", "shown"),
    [
        ("/data/runs", "/data/runs/demo", "/data/runs/demo"),
        ("/data/what?is#this", "/data/what?is#this/demo", "/data/what?is#this/demo"),
        ("s3://bucket", "s3://bucket/demo", "s3://bucket/demo"),
        ("s3://bucket/runs/", "s3://bucket/runs/demo", "s3://bucket/runs/demo"),
        ("s3://b/r?scheme=http&region=x", "s3://b/r/demo?scheme=http&region=x", "s3://b/r/demo"),
        ("s3://me:pass@b/r/?region=x", "s3://me:pass@b/r/demo?region=x", "s3://b/r/demo"),
        ("abfs://box@account/r", "abfs://box@account/r/demo", "abfs://box@account/r/demo"),
    ],
)
def test_uri_options_are_last_and_credentials_hidden(storage: str, uri: str, shown: str) -> None:
    folder = RunStorage.at(storage, "demo")
    assert folder.uri == uri
    assert str(folder) == shown


def test_redact_credentials() -> None:
    assert redact_credentials("s3://me:pa%2Fss@b/r?scheme=http") == "s3://b/r?scheme=http"
    for same in ("s3://b/r?scheme=http", "/data/a:b@c", "abfs://box@account/r", "mnist"):
        assert redact_credentials(same) == same


def test_credentials_in_a_uri(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    folder = RunStorage.at(bucket.uri("keys", user="me:pass@"), "demo")
    folder.create()
    folder.write("a.txt", b"a")
    assert bucket.files("keys/demo/") == {"a.txt": b"a"}


def test_write_and_read(storage: str) -> None:
    folder = RunStorage.at(storage, "demo")
    folder.create()
    folder.create()  # as when a run is resumed
    filesystem, path = folder.open()
    assert folder.read("config.yaml") is None
    assert folder.read("deep/er/file") is None
    for blob in (b"one", b"", b"three" * 1000):
        folder.write("config.yaml", blob)
        folder.write("deep/er/file", blob[::-1])
        assert folder.read("config.yaml") == blob
        assert folder.read("deep/er/file") == blob[::-1]
    assert folder.read("deep") is None  # a folder is not a file
    there = filesystem.get_file_info(pyarrow.fs.FileSelector(path, recursive=True))
    assert {i.path.removeprefix(f"{path}/") for i in there if i.is_file} == {
        "config.yaml", "deep/er/file",
    }  # fmt: skip
    assert RunStorage.at(storage, "other").read("config.yaml") is None


def test_writes_are_atomic(tmp_path: Path) -> None:
    folder = RunStorage.at(str(tmp_path), "demo")
    blobs = {bytes([n]) * 2_000_000 for n in (1, 2)}
    folder.write("file", next(iter(blobs)))
    over = threading.Event()

    def write() -> None:
        while not over.is_set():
            for blob in blobs:
                folder.write("file", blob)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert all(folder.read("file") in blobs for _ in range(200))
    finally:
        over.set()
        writer.join()
    assert [p.name for p in (tmp_path / "demo").iterdir()] == ["file"]
    assert (tmp_path / "demo" / "file").stat().st_mode & 0o777 == 0o644


def test_unwritable_storage(tmp_path: Path, bucket: Any) -> None:
    (tmp_path / "file").write_text("")
    for storage in (f"{tmp_path}/file", "/proc/runs"):
        message = error_of(RunStorage.at(storage, "demo"))
        assert f"storage '{storage}' cannot be written: " in message
        assert "--storage" in message
    nowhere = bucket.uri("runs", user="me:pass@").replace("//me:pass@bucket", "//me:pass@nowhere")
    message = error_of(RunStorage.at(nowhere, "demo"))
    assert "cannot be written" in message
    assert "'nowhere' not found" in message
    assert "pass@" not in message
    for storage in ("ftp://me:pass@machine/runs", "s3://bucket/runs?no-such-option=1"):
        message = error_of(RunStorage.at(storage, "demo"))
        assert "--storage" in message
        assert "cannot be opened" in message
        assert "pass@" not in message
    assert os.listdir(tmp_path) == ["file"]


def test_mirror_of_a_local_folder_is_the_folder(tmp_path: Path) -> None:
    folder = RunStorage.at(str(tmp_path), "demo")
    mirror = StorageMirror(folder)
    assert mirror.path == tmp_path / "demo"
    mirror.push()
    assert not mirror.path.exists()


def test_mirror_uploads_changed_files_only(bucket: Any) -> None:
    folder = RunStorage.at(bucket.uri("mirror"), "demo")
    folder.create()
    folder.write("config.yaml", b"of another writer")
    mirror = StorageMirror(folder)
    (mirror.path / "samples").mkdir()
    (mirror.path / "metrics.jsonl").write_text("one\n")
    (mirror.path / "samples" / "1.png").write_bytes(b"1")
    (mirror.path / "same-size").write_bytes(b"a")
    mirror.push()
    written = {"metrics.jsonl": b"one\n", "samples/1.png": b"1", "same-size": b"a"}
    assert bucket.files("mirror/demo/") == {"config.yaml": b"of another writer", **written}

    mirror.push()
    with (mirror.path / "metrics.jsonl").open("a") as lines:
        lines.write("two\n")
    (mirror.path / "samples" / "2.png").write_bytes(b"2")
    (mirror.path / "same-size").write_bytes(b"b")
    os.utime(mirror.path / "same-size", ns=(1, 1))  # whatever the clock's resolution
    mirror.push()
    mirror.push()
    written |= {"metrics.jsonl": b"one\ntwo\n", "samples/2.png": b"2", "same-size": b"b"}
    assert bucket.files("mirror/demo/") == {"config.yaml": b"of another writer", **written}
    versions = bucket.versions("mirror/demo/")
    assert {name: versions[name] for name in written} == {
        "metrics.jsonl": 2, "samples/1.png": 1, "samples/2.png": 1, "same-size": 2,
    }  # fmt: skip


def test_credentials_and_options_of_a_uri_are_redacted() -> None:
    location = "s3://key:secret@bucket/set?region=eu-west-1&scheme=http"
    assert redact_uri(location) == "s3://bucket/set"
    assert redact_uri("file:///data/set") == "file:///data/set"
    assert redact_uri("data/set") == "data/set"
