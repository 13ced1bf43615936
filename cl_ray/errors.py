"""Errors that a user can fix, and text that is safe to show."""

import re


class UserError(Exception):
    """A mistake that the user can fix: what is wrong, where, and how to fix it.

    The command line shows the message without a traceback. Credentials in a URI of the message
    are removed.
    """

    def __init__(self, message: str):
        super().__init__(redact_credentials(message))


def redact_credentials(text: str) -> str:
    """Return a text without the user and password of the URIs in it; their options stay."""
    return re.sub(r"(?<=://)[^/@?\s]*:[^/@?\s]*@", "", text)


def first_error_line(error: BaseException) -> str:
    """Return the first line of an error's message, without its full stop."""
    lines = str(error).strip().splitlines()
    return lines[0].strip().rstrip(".") if lines else type(error).__name__
