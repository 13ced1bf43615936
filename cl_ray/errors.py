"""Errors that are the user's to mend."""


class UserError(Exception):
    """One clear sentence about a user's mistake: what, where and the way out.

    Shown without a traceback.
    """
