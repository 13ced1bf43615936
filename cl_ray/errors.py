"""Errors that a user can fix, and text that is safe to show."""

import contextlib
import errno
import os
import re
from collections.abc import Iterator

import yaml

from cl_ray.uri import redact

_REMEDIES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space or have the quota raised",
    errno.EFBIG: "raise the limit on the size of files (`ulimit -f`)",
    errno.EROFS: "mount it writable or take another folder",
    errno.EACCES: "give this user access or take another folder",
    errno.EPERM: "give this user access or take another folder",
    errno.EIO: "check the disk",
}
"""What to do about storage that fails; a restart does not help."""
_UNPRINTABLE = re.compile(
    r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]"
)


class UserError(Exception):
    """A mistake that the user can fix: what is wrong, where, and how to fix it.

    The command line shows the message without a traceback. What may be secret in a URI of the
    message is removed.
    """

    def __init__(self, message: str):
        super().__init__(printable(redact(message)))


class StorageError(UserError):
    """Storage is full, read-only, forbidden or failing; once mended, the same command goes on."""


@contextlib.contextmanager
def storage_errors(place: object) -> Iterator[None]:
    """Turn an OSError of storage that fails into one sentence on what to do.

    Args:
        place: What is named if the error does not name a file.

    Raises:
        StorageError: In place of such an OSError; any other one stays.
    """
    try:
        yield
    except OSError as error:
        remedy = _REMEDIES.get(error.errno or 0)
        if error.errno is None or remedy is None:
            raise
        path = error.filename if isinstance(error.filename, str) else place
        reads = error.errno in (errno.EACCES, errno.EPERM, errno.EIO)
        raise StorageError(
            f"{path} cannot be {'read or ' if reads else ''}written "
            f"({os.strerror(error.errno)}): {remedy}, then give the same command again."
        ) from error


def printable(text: str, keep: str = "") -> str:
    r"""Return a text with its control characters escaped, such as `\x1b`.

    A terminal obeys them, and names of classes and files, notes and errors of libraries may hold
    some. Escaped as well: what overrides the direction of writing (Unicode Standard Annex 9,
    section 2), and surrogates, which cannot be encoded.

    Args:
        text: Any text.
        keep: Characters that stay, such as a line feed.
    """
    return _UNPRINTABLE.sub(
        lambda m: m[0] if m[0] in keep else m[0].encode("unicode_escape").decode(), text
    )


def pluralize(number: int, noun: str) -> str:
    """Format as 1 epoch or 1,000 epochs."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def format_duration(seconds: float) -> str:
    """Format as 12 s, 4:56 or 1:02:03."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def first_error_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__


def yaml_error_reason(error: yaml.YAMLError) -> str:
    """Return what is wrong with a YAML text and in which line, without quoting the text."""
    mark = getattr(error, "problem_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or "not readable"
    return f"{reason}, line {mark.line + 1}" if mark else str(reason)
