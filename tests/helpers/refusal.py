"""Errors of commands that run in this process."""

import pytest

from cl_ray.cli import main


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Return the error of a command, which must be its only line on stderr; its status is 1."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("cl-ray: ")
    assert message.count("\n") == 1
    return message.removeprefix("cl-ray: ").rstrip()
