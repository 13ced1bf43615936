"""`cl-ray train`: from flags, presets, files and existing runs to a config, and on to `train`."""

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field

from cl_ray.cli import parse
from cl_ray.config import Config, build, check_name, preset
from cl_ray.errors import UserError


class TrainCommand(Config):
    """Train G and D on pairs of images, or go on with the run of that name."""

    config: str | None = Field(None, description="YAML file, or its URI, of fields to start from.")
    address: str | None = Field(
        None, description="Ray cluster to join; None starts Ray here, or obeys RAY_ADDRESS."
    )
    dashboard: bool = Field(False, description="Start the Ray dashboard and print its address.")
    verbose: bool = Field(False, description="Show Ray's messages and the workers' output.")
    max_failures: int = Field(3, ge=0, description="Times that dead workers are started again.")
    from_checkpoint: str | None = Field(
        None, description="Go back to this checkpoint of an existing run; later ones are deleted."
    )


LAUNCH = ("config", "address", "dashboard", "verbose", "max_failures", "from_checkpoint")


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    base = starting_point(arguments)
    command = parse(TrainCommand, arguments, default=base, prog="cl-ray train")
    fields = command.model_dump(exclude=set(LAUNCH))
    from cl_ray.training.launch import LaunchOptions, train

    options = {k: getattr(command, k) for k in LAUNCH if k != "config"}
    train(build(fields, "the flags"), LaunchOptions(**options))


def starting_point(arguments: Sequence[str]) -> TrainCommand:
    """The config that the flags change: an existing run's own or the preset's, then the file's.

    Raises:
        UserError: The preset is unknown, the file or the run's config.yaml is wrong, or the run was
            made with another preset.
    """
    given = {name: flag(arguments, name) for name in ("preset", "config", "storage")}
    storage = Config().storage if given["storage"] is None else given["storage"]
    run = existing_run(storage, plain_name(arguments))
    if run is None:
        base = preset(given["preset"] or default_preset())
    else:
        base = run
        if given["preset"] not in (None, run.preset):
            preset(str(given["preset"]))
            raise UserError(
                f"The run {run.name} was made with the preset {run.preset}, not {given['preset']}: "
                "leave --preset out to go on with it, or take another --name."
            )
    if given["config"]:
        base = Config.load(given["config"], base)
        if given["preset"] not in (None, base.preset):
            raise UserError(
                f"{given['config']} says preset {base.preset} and the flag says {given['preset']}: "
                "leave one of them out."
            )
    return TrainCommand.model_validate(base.model_dump())


def existing_run(storage: str, name: str | None) -> Config | None:
    """The config of a run that is there already."""
    from cl_ray.data.dataset import first_error_line
    from cl_ray.errors import redact_credentials
    from cl_ray.storage import RunStorage

    if name is None or not storage:  # the latter is refused with the other flags
        return None
    folder = RunStorage.at(storage, name)
    try:
        text = folder.read("config.yaml")
    except OSError as error:
        raise UserError(
            f"storage {redact_credentials(storage)!r} cannot be read: {first_error_line(error)}."
        ) from error
    if text is None:
        return None
    run = Config.from_yaml(text.decode(), f"{folder}/config.yaml")
    return run.model_copy(update={"storage": folder.storage})


def default_preset() -> str:
    """`mnist` where a GPU is seen, `quick` on a CPU."""
    return "mnist" if Path("/dev/nvidia0").exists() else "quick"


def plain_name(arguments: Sequence[str], field: str = "name") -> str | None:
    """The name that the flags give, before a folder of that name is looked into.

    Raises:
        UserError: It cannot be one.
    """
    name = flag(arguments, field)
    if name is not None:
        try:
            check_name(name, field)
        except ValueError as error:
            raise UserError(f"In the flags: {error}.") from error
    return name


def flag(arguments: Sequence[str], name: str) -> str | None:
    """The value of `--name VALUE` or `--name=VALUE`, looked at before the rest can be parsed."""
    value = None
    for this, after in zip(arguments, [*arguments[1:], None], strict=True):
        if this == f"--{name}":
            value = after
        elif this.startswith(f"--{name}="):
            value = this.partition("=")[2]
    return value
