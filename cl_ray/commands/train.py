"""`cl-ray train`: build the config from preset, run, file and flags, and train."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import Field

from cl_ray.cli import add_data_defaults, default_preset, flag_value, name_flag, parse_flags
from cl_ray.config import Config, LaunchOptions, build_config, preset
from cl_ray.errors import UserError, first_error_line

if TYPE_CHECKING:
    from cl_ray.data.dataset import DatasetInfo


class TrainCommand(LaunchOptions, Config):
    """Train G and D on pairs of images, or resume the run of that name."""

    config: str | None = Field(None, description="YAML file (path or URI) of fields to start from.")


def command(arguments: Sequence[str]) -> None:
    """Run `cl-ray train`."""
    flags = parse_flags(
        TrainCommand, arguments, default=base_config(arguments), prog="cl-ray train"
    )
    config = build_config(flags.model_dump(include=set(Config.model_fields)), "the flags")
    from cl_ray.training.launch import train

    train(config, flags)


def base_config(arguments: Sequence[str]) -> TrainCommand:
    """Return the config that the flags change: the run's own or the data's, then the file's.

    Raises:
        UserError: The preset is unknown, the file or the run's config.yaml is invalid, or the run
            has another preset.
    """
    asked, file = flag_value(arguments, "preset"), flag_value(arguments, "config")
    named = Config.load(file, Config()) if file else Config()
    storage = flag_value(arguments, "storage")
    run = load_run_config(
        named.storage if storage is None else storage, name_flag(arguments) or named.name
    )
    info = None if run else _read_info(flag_value(arguments, "data") or named.data)
    config = run or preset(asked or default_preset(info.shape[0] if info else None, file))
    if run and asked not in (None, run.preset):
        preset(str(asked))
        raise UserError(
            f"The run {run.name} has the preset {run.preset}, not {asked}: leave --preset out to "
            "resume it, or use another --name."
        )
    if file:
        config = Config.load(file, config)
        if asked not in (None, config.preset):
            raise UserError(
                f"{file} has the preset {config.preset} and the flag has {asked}: leave one out."
            )
    if info and "train" in info.splits:
        images, flags = info.splits["train"].rows, ("epochs", "epoch-repeats")
        given = flag_value(arguments, "batch-size") or ""
        batch_size: int | None = int(given) if given.isdecimal() else config.batch_size
        if any(flag_value(arguments, flag) is not None for flag in flags):
            batch_size = None
        config = add_data_defaults(config, file, images, info.photographic, batch_size)
    return TrainCommand.model_validate(config.model_dump())


def _read_info(data: str) -> "DatasetInfo | None":
    if data == Config().data:
        return None
    from cl_ray.data.dataset import read_info  # imports pyarrow

    return read_info(data)


def load_run_config(storage: str, name: str | None) -> Config | None:
    """Load the config of an existing run; None if there is no such run.

    Raises:
        UserError: The storage cannot be read, or the run's config.yaml is invalid.
    """
    if name is None or not storage:  # an empty storage is refused with the other flags
        return None
    from cl_ray.storage import RunStorage  # imports pyarrow

    folder = RunStorage.at(storage, name)
    try:
        text = folder.read("config.yaml")
    except OSError as error:
        raise UserError(
            f"storage {storage!r} cannot be read: {first_error_line(error)}."
        ) from error
    if text is None:
        return None
    run = Config.from_run_yaml(text.decode(errors="replace"), f"{folder}/config.yaml")
    return run.model_copy(update={"storage": folder.storage})
