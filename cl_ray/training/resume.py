"""What earlier attempts left of a run: whether it goes on, begins again or is damaged."""

from typing import Any

from rich.console import Console

from cl_ray.base_config import marked_fields
from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config, differences
from cl_ray.errors import UserError
from cl_ray.storage import RunStorage

LATER = ("generator.safetensors", "checkpoints/best.txt")
"""Files of a run that had a whole checkpoint once."""


def check_resumable(
    config: Config, folder: RunStorage, checkpoints: CheckpointStore, console: Console
) -> None:
    """See that the run of that name can go on so; say if there is nothing to go on from.

    Args:
        config: What is asked for.
        folder: The run folder.
        checkpoints: Those in it.
        console: Told of a run that begins again.

    Raises:
        UserError: What is there is damaged, or of another config.
    """
    written, newest = folder.read("config.yaml"), checkpoints.newest()
    _see_that_whole(folder, checkpoints, written is not None, newest is not None)
    if written is None:
        return
    changed = differences(Config.from_run(written.decode(), f"{folder}/config.yaml"), config)
    if newest:
        changeable = marked_fields(Config, "changeable_on_resume")
        changed = {field: pair for field, pair in changed.items() if field not in changeable}
        if changed:
            raise UserError(
                f"The run {folder} has another config ({_shown(changed)}): leave those out to go "
                "on with it, or take another --name."
            )
        return
    changed = {k: pair for k, pair in changed.items() if k not in ("name", "storage")}
    but = f", but {_shown(changed)}" if changed else ""
    console.print(
        f"The run {folder} has no checkpoint yet and begins again, with the settings of its "
        f"config.yaml{but}.",
        soft_wrap=True,
        highlight=False,
        markup=False,
    )


def _see_that_whole(
    folder: RunStorage, checkpoints: CheckpointStore, config: bool, newest: bool
) -> None:
    """Refuse a folder that lost its config or its checkpoints; a first one may be cut short."""
    names = checkpoints.names()
    if not names:
        return
    way_out = "put back what is missing, or take another --name"
    if not config:
        raise UserError(f"The run {folder} has checkpoints and no config.yaml: {way_out}.")
    if newest or (len(names) == 1 and not any(folder.read(file) for file in LATER)):
        return
    raise UserError(
        f"The run {folder} is damaged: none of its checkpoints ({', '.join(names)}) has a whole "
        f"manifest.json: {way_out}."
    )


def _shown(changed: dict[str, tuple[Any, Any]]) -> str:
    return "; ".join(f"{field} was {a!r}, now {b!r}" for field, (a, b) in changed.items())
