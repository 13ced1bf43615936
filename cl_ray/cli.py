"""The `cl-ray` command, one verb each: what `cl_ray/commands/` holds."""

import contextlib
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated, Any

import tyro
from pydantic import ValidationError

from cl_ray.base_config import BaseConfig
from cl_ray.config import explain
from cl_ray.errors import UserError

INTERRUPTED = 130
"""The shell's exit status for a command that Ctrl-C ended."""

AFTER = {
    "train": "; with the run's --name it goes on from the last checkpoint, or begins again if "
    "there is none yet"
}
"""What a verb that Ctrl-C ended says of the way on."""

RunPath = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""The run that a verb is about: its folder's path or URI, with no flag before it."""

COMMANDS = {
    "train": "train G and D on pairs of images, or go on with a run",
    "evaluate": "measure a run's samples and features beside real images",
    "generate": "make images of noise, or variants of images",
    "embed": "write D's representation of a data set's images",
    "report": "write a page of a run's pictures, curves and metrics",
    "export": "write a run's networks as ONNX files or torch.export programs",
    "data": "turn a torchvision data set, a folder of images or Parquet into a data set",
    "doctor": "look for what would stop a run on this machine or cluster",
}
"""What each verb does; its module is imported when it is asked for."""


def usage() -> str:
    """What `cl-ray` alone prints."""
    verbs = "\n".join(f"  {verb:<9} {what}" for verb, what in COMMANDS.items())
    return (
        f"usage: cl-ray COMMAND [flags]\n\n{verbs}\n\n"
        "`cl-ray COMMAND --help` lists a command's flags with their defaults."
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; a user's mistake ends it with one sentence and status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    verb = arguments[0]
    try:
        if verb not in COMMANDS:
            raise UserError(f"There is no command {verb!r}; there are: {', '.join(COMMANDS)}.")
        import_module(f"cl_ray.commands.{verb}").command(arguments[1:])
    except UserError as error:
        print(f"cl-ray: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # `cl-ray train --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"cl-ray: stopped{AFTER.get(verb, '')}.", file=sys.stderr)
        sys.exit(INTERRUPTED)


def parse(kind: type[Any], arguments: Sequence[str], prog: str, default: Any = None) -> Any:
    """The flags as a checked record; tyro prints the help and complains of unknown flags.

    Raises:
        UserError: A value is out of its range, or values contradict each other.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                kind,
                args=list(arguments),
                prog=prog,
                **({} if default is None else {"default": default}),
            )
    except SystemExit as end:
        # tyro shows pydantic's report in a box; one sentence says more.
        cause = end.__context__
        while cause is not None and not isinstance(cause, ValidationError):
            cause = cause.__context__
        if cause is not None:
            within = section(kind, cause.title) or ""
            raise UserError(f"In the flags: {explain(cause, within)}.") from None
        sys.stderr.write(complaint.getvalue())
        raise


def section(kind: type[Any], title: str, path: str = "") -> str | None:
    """Where the part of that class lies in a record, as `optimizer.`; None if nowhere."""
    for name, field in kind.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseConfig):
            here = f"{path}{name}."
            found = here if part.__name__ == title else section(part, title, here)
            if found:
                return found
    return None
