"""The token that Ray asks for: where it is, and that only this user can read it.

Whoever has the token can run any program in this user's name. Ray 2.60 writes the file so that all
users of the machine can read it, and reads one that anybody may have written.
"""

import contextlib
import os
import pwd
import secrets
import stat
from collections.abc import Iterator
from pathlib import Path

from cl_ray.errors import UserError

OTHERS = stat.S_IRWXG | stat.S_IRWXO
"""The permissions of the group and of all others."""


def token_file() -> Path | None:
    """The file in which Ray looks for the token; None if it has no home folder to look in."""
    given, home = os.environ.get("RAY_AUTH_TOKEN_PATH"), os.environ.get("HOME")
    if given:
        return Path(given)
    return Path(home) / ".ray" / "auth_token" if home else None


def readable_by_others(path: Path) -> str | None:
    """The permissions of a file or folder as `chmod` writes them; None if only its owner has any.

    A file in a folder that only its owner can enter is not readable by others.
    """
    mode = stat.S_IMODE(path.stat().st_mode)
    return f"{mode:03o}" if mode & OTHERS else None


def prepare_token(private: Path) -> Iterator[str]:
    """Have a token that only this user can read, before Ray starts here.

    Without a home folder that can be written, the token is in the folder `private`, which only
    this user can enter, and RAY_AUTH_TOKEN_PATH is set.

    Yields:
        What the user should know.

    Raises:
        UserError: The token's file is not this user's.
    """
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        yield (
            f"RAY_AUTH_MODE is {mode}: every user of this machine can run programs in your name "
            "while Ray runs. Unset it."
        )
        return
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    file = token_file()
    if os.environ.get("RAY_AUTH_TOKEN_PATH"):
        yield from _check_given_file(Path(os.environ["RAY_AUTH_TOKEN_PATH"]))
        return
    try:
        if file is None:
            raise FileNotFoundError("HOME is not set")
        create_token(file)
        yield from _tighten(file)
    except OSError as error:
        where = private / "auth_token"
        create_token(where)
        os.environ["RAY_AUTH_TOKEN_PATH"] = str(where)
        reason = f"{file}: {error.strerror}" if file else str(error)
        yield f"Ray's token is in {where} ({reason})."


def create_token(file: Path) -> None:
    """Write a new token into a file, unless there is one, and create its folder.

    Of two processes that do so at once, both use the same token.

    Raises:
        OSError: The folder cannot be written.
    """
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if os.path.lexists(file):
        return
    draft = file.with_name(f".{file.name}-{secrets.token_hex(8)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32))
            stream.flush()
            os.fsync(stream.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)  # unlike a rename, it never replaces another's
    finally:
        draft.unlink()


def _tighten(file: Path) -> Iterator[str]:
    """Take from others what they may do with the file and its folder.

    Raises:
        UserError: One of them is not this user's, or the file is no regular one.
        OSError: The permissions cannot be changed.
    """
    lax = []
    for path in (file.parent, file):
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode) or info.st_uid != os.geteuid():
            owner = "is a symbolic link" if stat.S_ISLNK(info.st_mode) else _owner(info.st_uid)
            raise UserError(
                f"Ray's token {file} is not used, as {path} {owner}: remove it for a new token, or "
                "set RAY_AUTH_TOKEN_PATH to a file of yours."
            )
        if mode := readable_by_others(path):
            lax.append(f"{path} had {mode}")
            path.chmod(stat.S_IMODE(info.st_mode) & ~OTHERS)
    if not file.stat().st_size:
        raise UserError(f"Ray's token {file} is empty: remove it for a new token.")
    if lax:
        yield (
            f"Ray's token could be read by others ({', '.join(lax)}) and is yours alone now: if "
            f"somebody may have read it, remove {file} for a new one."
        )


def _check_given_file(file: Path) -> Iterator[str]:
    """Check the file that RAY_AUTH_TOKEN_PATH names, which may be a mounted secret of root's."""
    try:
        mode, size = readable_by_others(file), len(file.read_text().strip())
    except OSError as error:
        raise UserError(
            f"RAY_AUTH_TOKEN_PATH {file} cannot be read ({error.strerror}): unset it, or give a "
            "file that holds a token."
        ) from error
    if not size:
        raise UserError(f"RAY_AUTH_TOKEN_PATH {file} is empty: unset it, or give a token.")
    if mode:
        yield f"Others can read Ray's token {file}, whose permissions are {mode}: chmod 600 {file}"


def _owner(uid: int) -> str:
    try:
        return f"belongs to {pwd.getpwuid(uid).pw_name}"
    except KeyError:
        return f"belongs to user {uid}"
