"""Ray's token: made, tightened or refused before Ray starts."""

import os
import stat
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cl_ray.errors import UserError
from cl_ray.training.auth_token import create_token, prepare_token

TOKEN = "0123456789abcdef" * 4


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The token's place in a home folder without one."""
    for name in [name for name in os.environ if name.startswith("RAY_AUTH")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    return tmp_path / "home/.ray/auth_token"


@pytest.fixture
def private(tmp_path: Path) -> Path:
    folder = tmp_path / "private"
    folder.mkdir(mode=0o700)
    return folder


def lax(token: Path, folder_mode: int, file_mode: int) -> None:
    token.parent.mkdir()
    token.write_text(TOKEN)
    token.chmod(file_mode)
    token.parent.chmod(folder_mode)


def test_a_new_token_is_for_its_owner_alone(token: Path, private: Path) -> None:
    before = os.umask(0)
    try:
        assert list(prepare_token(private)) == []
    finally:
        os.umask(before)
    assert (mode(token.parent), mode(token)) == (0o700, 0o600)
    assert len(token.read_text()) == 64
    first = token.read_text()
    assert list(prepare_token(private)) == []
    assert token.read_text() == first
    assert [file.name for file in token.parent.iterdir()] == ["auth_token"]


@pytest.mark.parametrize(
    ("folder_mode", "file_mode", "named"),
    [(0o755, 0o644, 2), (0o700, 0o640, 1), (0o770, 0o600, 1), (0o700, 0o602, 1)],
)
def test_a_lax_token_is_tightened_and_said(
    token: Path, private: Path, folder_mode: int, file_mode: int, named: int
) -> None:
    lax(token, folder_mode, file_mode)
    (line,) = prepare_token(private)
    assert line.startswith("Ray's token could be read by others (")
    assert line.count(" had ") == named
    assert (mode(token.parent), mode(token)) == (0o700, 0o600)
    assert token.read_text() == TOKEN
    assert list(prepare_token(private)) == []


def test_a_token_that_is_not_ours_is_refused(
    token: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lax(token, 0o700, 0o600)
    owner = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(UserError, match=r"is not used, as .* belongs to .*: remove it for a new"):
        list(prepare_token(private))
    monkeypatch.undo()
    monkeypatch.setenv("HOME", str(token.parent.parent))
    (private / "elsewhere").write_text(TOKEN)
    token.unlink()
    token.symlink_to(private / "elsewhere")
    with pytest.raises(UserError, match=r"auth_token is a symbolic link: remove it"):
        list(prepare_token(private))
    token.unlink()
    token.touch(mode=0o600)
    with pytest.raises(UserError, match=r"auth_token is empty: remove it"):
        list(prepare_token(private))


@pytest.mark.parametrize("home", [None, "/proc/nowhere"])
def test_without_a_home_folder_it_is_in_the_private_one(
    home: str | None, token: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if home:
        monkeypatch.setenv("HOME", home)
    else:
        monkeypatch.delenv("HOME")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    (line,) = prepare_token(private)
    assert line.startswith(f"Ray's token is in {private}/auth_token (")
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == f"{private}/auth_token"
    assert mode(private / "auth_token") == 0o600
    assert list(prepare_token(private)) == []


def test_a_token_that_the_user_gives(
    token: Path, private: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that root has mounted, by a link."""
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", f"{private}/link")
    with pytest.raises(UserError, match="cannot be read"):
        list(prepare_token(private))
    (private / "secret").write_text(TOKEN)
    (private / "link").symlink_to("secret")
    (private / "secret").chmod(0o644)
    assert list(prepare_token(private)) == [
        f"Others can read Ray's token {private}/link, whose permissions are 644: chmod 600 "
        f"{private}/link"
    ]
    (private / "secret").chmod(0o600)
    assert list(prepare_token(private)) == []
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH")
    assert list(prepare_token(private)) == []
    assert not token.exists()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    (line,) = prepare_token(private)
    assert line.startswith("RAY_AUTH_MODE is disabled: every user of this machine can run programs")


def test_all_that_start_at_once_use_one_token(tmp_path: Path) -> None:
    """None sees an incomplete one."""
    file, at_once = tmp_path / "folder/auth_token", threading.Barrier(8)

    def start(_: int) -> str:
        at_once.wait()
        create_token(file)
        return file.read_text()

    with ThreadPoolExecutor(8) as pool:
        seen = set(pool.map(start, range(8)))
    create_token(file)
    assert {file.read_text()} == seen
    assert [path.name for path in file.parent.iterdir()] == ["auth_token"]
