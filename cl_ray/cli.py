"""The `cl-ray` program: one command for each module of `cl_ray.commands`, and flag parsing."""

import contextlib
import io
import math
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

import tyro
from pydantic import ValidationError

from cl_ray.base_config import BaseConfig
from cl_ray.config import PHOTO_DEPTHS, Config, check_name, explain_validation_error, preset
from cl_ray.data.config import PHOTO_VIEWS
from cl_ray.errors import UserError, pluralize, storage_errors
from cl_ray.signals import interrupt_kept, termination_as_interrupt
from cl_ray.uri import redact, remember_secrets, uri_problem

EXIT_INTERRUPTED = 130
"""The shell's exit status of a program that Ctrl-C stopped."""

RunPath = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
"""The path or URI of a run folder, as the first argument of a command."""

COMMANDS = {
    "train": "train G and D on pairs of images, or resume a run",
    "tune": "search for the balance between G and D over many runs",
    "evaluate": "measure a run's samples and features beside real images",
    "generate": "generate images from noise, or variants of given images",
    "embed": "write D's representation of the images of a dataset",
    "score": "write a novelty score for each image of a dataset",
    "label": "predict the labels of unlabelled training images from few labelled ones",
    "report": "write a page of a run's images, curves and metrics",
    "export": "write a run's networks as ONNX files or torch.export programs",
    "data": "convert images (folder, archive, Parquet, arrays or a torchvision dataset)",
    "doctor": "check this machine or a cluster for problems before a run",
}
"""Each command with its help; a module is imported when its command is used."""

_PHOTO_SIDE = 48
"""Images of as many pixels have a preset of their size by default."""
ENOUGH_STEPS = 800
"""Steps of a run by default, at least: the preset `quick` takes 860 of the packaged digits."""
EPOCH_STEPS = 80
"""Steps of an epoch of few images, at most. What follows an epoch (a checkpoint, image grids, a new
prior) takes the CPU time of half a step, and an evaluation much more."""
_TRAIN_HINT = (
    "; with the run's --name it resumes from the last checkpoint, or starts again if there is none "
    "yet"
)


def usage() -> str:
    """Return the help of `cl-ray` without a command."""
    lines = "\n".join(f"  {name:<9} {text}" for name, text in COMMANDS.items())
    return (
        f"usage: cl-ray COMMAND [flags]\n\n{lines}\n\n"
        "`cl-ray COMMAND --help` lists the flags of a command with their defaults."
    )


@termination_as_interrupt()
def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command; on a user's mistake print one sentence and exit with status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return
    name = arguments[0]
    try:
        if name not in COMMANDS:
            raise UserError(f"There is no command {name!r}; there are: {', '.join(COMMANDS)}.")
        check_uris(arguments[1:])
        with interrupt_kept(), storage_errors("A file"):
            import_module(f"cl_ray.commands.{name}").command(arguments[1:])
    except UserError as error:
        print(f"cl-ray: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"cl-ray: stopped{_TRAIN_HINT if name == 'train' else ''}.", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
    except Exception:  # the message of a library may hold a secret that it was given
        sys.exit(redact(traceback.format_exc()))


def check_uris(arguments: Sequence[str]) -> None:
    """Check the URIs in the arguments of a command before anything shows or stores them.

    Raises:
        UserError: One may hold a secret, or cannot be read: the flag is named, the URI not shown.
    """
    flag = ""
    for argument in arguments:
        if argument.startswith("--"):
            flag = argument.partition("=")[0]
        uri = re.search(r"[A-Za-z][\w+.-]*://.*", argument, re.DOTALL)
        if uri is None:
            continue
        is_study = flag == "--study"
        if problem := uri_problem(uri[0], is_study):
            raise UserError(f"{flag if re.fullmatch('--[a-z._-]+', flag) else 'A URI'} {problem}.")
        if is_study:
            remember_secrets(uri[0])


def parse_flags(kind: type[Any], arguments: Sequence[str], prog: str, default: Any = None) -> Any:
    """Parse flags into a config of that kind; those that are left out are as in `default`.

    tyro prints the help and reports unknown flags.

    Raises:
        UserError: A value is out of its range, or values contradict each other.
    """
    output = io.StringIO()
    given = {} if default is None else {"default": default}
    try:
        with contextlib.redirect_stderr(output):
            return tyro.cli(kind, args=list(arguments), prog=prog, **given)
    except SystemExit as end:
        # tyro prints pydantic's report in a box; one sentence is clearer.
        cause = end.__context__
        while cause is not None and not isinstance(cause, ValidationError):
            cause = cause.__context__
        if cause is not None:
            section = _section_of(kind, cause.title) or ""
            raise UserError(f"In the flags: {explain_validation_error(cause, section)}.") from None
        sys.stderr.write(output.getvalue())
        raise


def flag_value(arguments: Sequence[str], flag: str) -> str | None:
    """Return the value of `--flag VALUE` or `--flag=VALUE` before the flags are parsed.

    As tyro does, it takes `_` in a flag for `-`, and the last value of several.
    """
    value = None
    for argument, following in zip_longest(arguments, arguments[1:]):
        name, equals, text = argument.partition("=")
        if name.replace("_", "-") == f"--{flag}":
            value = text if equals else following
    return value


def name_flag(arguments: Sequence[str], flag: str = "name") -> str | None:
    """Return the valid name (else a UserError) of a run or a search before flags are parsed."""
    name = flag_value(arguments, flag)
    if name is not None:
        try:
            check_name(name, flag)
        except ValueError as error:
            raise UserError(f"In the flags: {error}.") from error
    return name


def default_preset(side: int | None, file: str | None = None) -> str:
    """Return the preset if none is given, for images of that side in pixels, if known.

    Images of 48 pixels or more have that of their size, which is printed unless the YAML `file`
    names another; others `mnist` on a machine with a GPU, else `quick`.
    """
    if side is not None and side >= _PHOTO_SIDE:
        name = f"photos-{next(known for known in PHOTO_DEPTHS if side <= known)}"
        if file is None or Config.load(file, preset(name)).preset == name:
            print(f"The preset is {name}, as the images have {side} × {side} pixels.")
        return name
    return "mnist" if Path("/dev/nvidia0").exists() else "quick"


def add_data_defaults(
    config: Config, file: str | None, images: int, photographic: bool, batch_size: int | None
) -> Config:
    """Return a config with the fields that its data choose, which are printed.

    Args:
        config: The config, with the fields of the file.
        file: The YAML file; the fields that it names are kept.
        images: Number of training images.
        photographic: Whether they are in colour; `views` are `PHOTO_VIEWS` then.
        batch_size: With how many pairs a step there are as many epochs as ENOUGH_STEPS take, or
            more, and epochs of few images have several passes; None leaves both as they are.
    """
    changes: dict[str, Any] = {"views": PHOTO_VIEWS} if photographic else {}
    length = _epochs_for(config.epochs, images, batch_size) if batch_size else {}
    chosen = config.model_copy(update=changes | length)
    if file:
        chosen = Config.load(file, chosen)
        if chosen.model_dump(include=set(length)) != length:  # the file sets it
            given = config.model_dump(include=set(length))
            chosen = chosen.model_copy(update=given)
    if chosen.views != config.views:
        print("The views are those of photographs, as the images are in colour; views.* sets them.")
    if chosen.epochs != config.epochs or chosen.epoch_repeats != config.epoch_repeats:
        passes = f" of {chosen.epoch_repeats} passes over them" if chosen.epoch_repeats > 1 else ""
        print(
            f"The run has {pluralize(chosen.epochs, 'epoch')}{passes}, as there are {images:,} "
            "training images; --epochs and --epoch-repeats set them."
        )
    return chosen


def _epochs_for(epochs: int, images: int, batch_size: int) -> dict[str, int]:
    """Return `epochs` and `epoch_repeats` with which few images have at least ENOUGH_STEPS."""
    passes = max(epochs, math.ceil(ENOUGH_STEPS * batch_size / images))
    repeats = max(1, EPOCH_STEPS * batch_size // images)
    return {"epochs": math.ceil(passes / repeats), "epoch_repeats": repeats}


def _section_of(kind: type[Any], title: str, prefix: str = "") -> str | None:
    """Return the dotted name of the part of that class in a config, such as `optimizer.`."""
    for name, field in kind.model_fields.items():
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseConfig):
            path = f"{prefix}{name}."
            found = path if part.__name__ == title else _section_of(part, title, path)
            if found:
                return found
    return None
