"""What Ray needs of a machine: found before it starts, in one sentence with the way out."""

import errno
import os
import shutil
import socket
import stat
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from helpers.refusal import error_of

from cl_ray.training import machine


class Usage(NamedTuple):
    """As `shutil.disk_usage` returns it."""

    total: int
    used: int
    free: int


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A temporary folder with a short path, unlike pytest's."""
    with tempfile.TemporaryDirectory(prefix="t-", dir="/tmp") as folder:
        monkeypatch.setenv("RAY_TMPDIR", folder)
        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(10**12, 0, 10**12))
        yield Path(folder)


def refusal() -> str:
    return error_of(lambda: list(machine.check_local_ray()))


def test_the_folder_is_this_users_alone(base: Path) -> None:
    assert machine.check_temp_folder().state == "ok"
    folder = machine.private_temp_folder()
    assert folder == base / f"ray-{os.geteuid()}"
    folder.chmod(0o777)
    assert machine.check_temp_folder().state == "ok"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    folder.rmdir()
    (base / "theirs").mkdir()
    folder.symlink_to(base / "theirs")
    assert refusal() == (
        f"Ray cannot start here: {folder} belongs to another user: set RAY_TMPDIR to a folder of "
        "yours with room, such as /var/tmp."
    )


def test_a_path_that_is_too_long_for_a_socket(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The length that the message gives is one at which a socket opens."""
    monkeypatch.setenv("RAY_TMPDIR", f"{base}/{'x' * 80}")
    message = refusal()
    assert message.startswith(f"Ray cannot start here: RAY_TMPDIR {base}/{'x' * 80} is too long")
    most = int(message.partition("at most ")[2].split()[0])
    monkeypatch.setenv("RAY_TMPDIR", f"{base}/{'x' * (most - len(str(base)) - 1)}")
    assert machine.check_temp_folder().state == "ok"
    path = machine.ray_temp_folder() / machine._LONGEST_SOCKET
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(path))
    monkeypatch.setenv("RAY_TMPDIR", f"{base}/{'x' * (most - len(str(base)))}")
    assert "is too long" in refusal()


def test_a_folder_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/proc/nowhere")
    assert "cannot be written (" in refusal()
    assert refusal().endswith("set RAY_TMPDIR to a folder of yours with room, such as /var/tmp.")


def test_a_full_disk(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is free, and by what can be written: a quota may be used up."""
    folder = machine.private_temp_folder()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**8, 10**8))
    assert f"{folder} has 100 MB of 1000.0 GB free, too little for Ray" in refusal()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**10, 10**10))
    line = next(iter(machine.check_local_ray()))
    assert "10.0 GB of 1000.0 GB free, and Ray writes no objects to a disk that is 95 %" in line

    def fail(**_: Any) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(tempfile, "TemporaryFile", fail)
    assert f"{folder} is full (" in refusal()


def test_little_shared_memory_is_said_and_little_memory_refused(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "available_memory", lambda: 8 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**10, 0, 10**10))
    assert list(machine.check_local_ray()) == []
    docker = {"/dev/shm": Usage(2**26, 0, 2**26)}
    monkeypatch.setattr(shutil, "disk_usage", lambda p: docker.get(p, Usage(10**10, 0, 10**10)))
    (line,) = machine.check_local_ray()
    assert line == (
        f"/dev/shm has 67 MB free, so that Ray keeps objects in {machine.ray_temp_folder()}, which "
        "is slower: free some, or give a container more (docker run --shm-size=3g)."
    )
    monkeypatch.setattr(machine, "available_memory", lambda: 5 * 10**8)
    assert refusal() == (
        "Ray cannot start here: 500 MB of memory are free, and Ray with one worker needs 2.5 GB: "
        "end other programs, or give the container more."
    )
