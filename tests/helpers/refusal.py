"""Errors of commands and functions that run in this process."""

from collections.abc import Callable

import pytest

from cl_ray.cli import main
from cl_ray.errors import UserError


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the error of a command, which must be its only line on stderr; its status is 1."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("cl-ray: ")
    assert message.count("\n") == 1
    return message.removeprefix("cl-ray: ").rstrip()


def error_of(function: Callable[..., object], *arguments: object) -> str:
    """Return the message of the UserError of a call: a sentence in one line."""
    with pytest.raises(UserError) as caught:
        function(*arguments)
    message = str(caught.value)
    assert message.endswith(".")
    assert "\n" not in message
    return message
