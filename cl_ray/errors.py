"""Errors that are the user's to mend."""

import re


class UserError(Exception):
    """One clear sentence about a user's mistake: what, where and the way out.

    Shown without a traceback, and without the keys of a URI that it names.
    """

    def __init__(self, sentence: str):
        super().__init__(redact_credentials(sentence))


def redact_credentials(text: str) -> str:
    """A text without the user and password that a URI in it may carry; its options stay."""
    return re.sub(r"(?<=://)[^/@?\s]*:[^/@?\s]*@", "", text)
