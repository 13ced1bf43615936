"""The run folder, on local disk and on S3 (moto's server, reached by pyarrow as MinIO is)."""

import errno
import os
import pickle
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from helpers.limits import file_size_limit
from helpers.refusal import error_of
from helpers.saved_states import States, save_steps, steps_of

from cl_ray.checkpoint import CheckpointStore
from cl_ray.errors import StorageError, UserError, storage_errors
from cl_ray.metrics_file import MetricsFile, read_epochs
from cl_ray.storage import LEASE_FILE, LeaseLostError, RunStorage, StorageMirror


@pytest.fixture(params=["local", "s3"])
def storage(request: pytest.FixtureRequest, tmp_path: Path, bucket: Any) -> str:
    return str(tmp_path / "runs") if request.param == "local" else bucket.uri(tmp_path.name)


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
        ("/data/what?is#this", "/data/what?is#this/demo", "/data/what?is#this/demo"),
        ("s3://bucket/runs/", "s3://bucket/runs/demo", "s3://bucket/runs/demo"),
        ("s3://b/r?scheme=http&region=x", "s3://b/r/demo?scheme=http&region=x", "s3://b/r/demo"),
        ("abfs://box@account/r", "abfs://box@account/r/demo", "abfs://box@account/r/demo"),
    ],
)
def test_uri_options_are_last_and_not_shown(storage: str, uri: str, shown: str) -> None:
    folder = RunStorage.at(storage, "demo")
    assert folder.uri == uri
    assert str(folder) == shown


@pytest.mark.parametrize("name", ["прогон-数据-é", "a+b@c%2F&=~'(1)", "数" * 76])
def test_names_that_a_uri_encodes(name: str, storage: str) -> None:
    folder = RunStorage.at(storage, name)
    folder.write("config.yaml", b"x")
    assert folder.open()[1].endswith(f"/{name}")
    assert RunStorage.from_uri(folder.uri) == folder
    assert RunStorage.existing(folder.uri).subfolder("trials").open()[1].endswith(f"{name}/trials")
    if folder.remote:
        assert folder.uri.isascii()
        raw = RunStorage.at(storage.replace("?", "/é?"), "demo")  # as a user types it
        raw.write("config.yaml", b"y")
        assert RunStorage.existing(raw.uri.replace("%C3%A9", "é")).read("config.yaml") == b"y"


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


def test_a_file_is_on_the_disk_before_its_name_and_both_before_the_write_returns(
    tmp_path: Path, disk_calls: list[tuple[str, str]]
) -> None:
    run = tmp_path / "runs" / "demo"
    RunStorage.at(f"{tmp_path}/runs", "demo").write("config.yaml", b"a")
    assert disk_calls == [
        ("sync", str(tmp_path)), ("sync", str(tmp_path / "runs")),  # the new folders' names
        ("sync", f"{run}/.config.yaml.{os.getpid()}.new"),
        ("rename", f"{run}/config.yaml"), ("sync", str(run)),
    ]  # fmt: skip
    assert (run / "config.yaml").stat().st_mode & 0o777 == 0o644


def test_a_write_that_fails_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    folder = RunStorage.at(str(tmp_path), "demo")
    folder.write("file", b"old")
    message = f"{tmp_path}/demo/file cannot be written (File too large): raise the limit on the "
    with (
        pytest.raises(StorageError, match=re.escape(message)),
        file_size_limit(1000),
        storage_errors(folder),
    ):
        folder.write("file", b"new" * 1000)
    assert [path.name for path in (tmp_path / "demo").iterdir()] == ["file"]
    assert folder.read("file") == b"old"
    with file_size_limit(10), pytest.raises(UserError, match="cannot be written: File too large"):
        RunStorage.at(str(tmp_path), "other").create()
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO])
def test_storage_that_fails_is_one_sentence_with_a_remedy(code: int) -> None:
    with pytest.raises(StorageError) as caught, storage_errors("runs/demo"):
        raise OSError(code, os.strerror(code))
    message = str(caught.value)
    assert message.startswith("runs/demo cannot be ")
    assert f"written ({os.strerror(code)}): " in message
    assert message.endswith(", then give the same command again.")
    with pytest.raises(OSError, match="unreachable"), storage_errors("runs/demo"):
        raise OSError(errno.ENETUNREACH, "unreachable")  # it may pass, and workers are restarted


def test_what_is_no_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place, message in (
        (tmp_path / "file", "file cannot be read: "),
        ("s3://bucket", "s3://bucket is a whole bucket: give the run's folder in it."),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            RunStorage.existing(place)


def test_processes_that_write_one_file_leave_one_of_their_contents(tmp_path: Path) -> None:
    code = (
        "import sys; from cl_ray.storage import RunStorage\n"
        "for n in range(200): RunStorage.at(sys.argv[1], 'demo').write('f', sys.argv[2].encode())"
    )
    writers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path), text * 999]) for text in "ab"
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert (tmp_path / "demo" / "f").read_text() in ("a" * 999, "b" * 999)
    assert os.listdir(tmp_path / "demo") == ["f"]
    (tmp_path / "demo" / ".f.1.new").write_text("of a process that was killed")
    RunStorage.at(str(tmp_path), "demo").take_lease()
    assert sorted(os.listdir(tmp_path / "demo")) == [LEASE_FILE, "f"]


def test_unwritable_storage(tmp_path: Path, bucket: Any) -> None:
    (tmp_path / "file").write_text("")
    message = error_of(RunStorage.at(f"{tmp_path}/file", "demo").create)
    assert f"storage '{tmp_path}/file' cannot be written: " in message
    assert "--storage" in message
    nowhere = bucket.uri("runs").replace("//bucket", "//nowhere")
    message = error_of(RunStorage.at(nowhere, "demo").create)
    assert "cannot be written" in message
    assert "'nowhere' not found" in message
    message = error_of(RunStorage.at("ftp://machine/runs", "demo").create)
    assert message.startswith("ftp://machine/runs/demo cannot be opened: ")
    assert os.listdir(tmp_path) == ["file"]


def test_mirror_uploads_changed_files_only(bucket: Any, tmp_path: Path) -> None:
    mirror = StorageMirror(RunStorage.at(str(tmp_path), "demo"))
    assert mirror.path == tmp_path / "demo"  # of a local folder it is that folder
    mirror.push()
    assert not mirror.path.exists()

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


def test_a_driver_that_takes_the_lease_ends_the_writes_of_the_one_before(
    storage: str, states: States
) -> None:
    folder = RunStorage.at(storage, "lease")
    folder.create()
    before = folder.take_lease()
    worker: RunStorage = pickle.loads(pickle.dumps(before))
    file = MetricsFile(worker, 2)
    file.add(1, 10, {})
    checkpoints = CheckpointStore(*worker.open(), before_write=worker.check_lease)
    save_steps(checkpoints, states, {1: 0.1})
    worker.subfolder("trials").write("config.yaml", b"before")
    trial = worker.subfolder("trial").take_lease()
    trial.write("config.yaml", b"before")

    now = folder.take_lease()
    writes: list[Callable[[], object]] = [
        lambda: worker.write("config.yaml", b"late"),
        lambda: worker.subfolder("trials").write("config.yaml", b"late"),
        lambda: trial.write("config.yaml", b"late"),
        lambda: file.add(2, 20, {}),
        lambda: save_steps(checkpoints, states, {2: 0.1}),
        lambda: checkpoints.rollback_to("step-00000001"),
        lambda: checkpoints.set_metric("step-00000001", 0.2, "loss"),
    ]
    for write in writes:
        with pytest.raises(LeaseLostError) as caught:
            write()
        assert str(caught.value) == (
            f"{folder} was taken over by process {os.getpid()} on {socket.gethostname()}, and this "
            "process stops: only one can write there."
        )
    assert folder.read("config.yaml") is None
    assert folder.read("trials/config.yaml") == b"before"
    assert [line["epoch"] for line in read_epochs(folder)] == [1]
    store = CheckpointStore(*now.open(), before_write=now.check_lease)
    assert steps_of(store) == [1]
    save_steps(store, states, {2: 0.1})
    now.write("config.yaml", b"now")


def test_a_checkpoint_is_not_completed_after_another_driver_took_over(
    storage: str, states: States
) -> None:
    folder = RunStorage.at(storage, "half")
    folder.create()
    checks: list[None] = []

    def check() -> None:
        checks.append(None)
        if len(checks) == 2:  # the files are written, but not the manifest
            folder.take_lease()
        before.check_lease()

    before = folder.take_lease()
    checkpoints = CheckpointStore(*before.open(), before_write=check)
    with pytest.raises(LeaseLostError):
        save_steps(checkpoints, states, {1: 0.1})
    assert checkpoints.names() == ("step-00000001",)
    assert steps_of(checkpoints) == []
