"""`from_run`: a new run begins with the networks of another run, to fine-tune them.

They become a checkpoint of step 0 of the new run, which it resumes from like from any other.
"""

from typing import TYPE_CHECKING, Any

from rich.console import Console

from cl_ray.base_config import marked_fields
from cl_ray.checkpoint import CHECKPOINTS, CheckpointStore
from cl_ray.config import WITHOUT_WEIGHTS, Config, differences
from cl_ray.console import print_line
from cl_ray.data.dataset import Dataset
from cl_ray.data.partition import Partition
from cl_ray.errors import UserError
from cl_ray.storage import RunStorage

if TYPE_CHECKING:
    from torch import Tensor

_NETWORKS = ("generator", "discriminator", "ema_generator")
_CLASS_LAYERS = ("class_embedding.", "class_head.")
"""Names of the weights that only a conditional network has: a vector or a row for each class."""


def resolve_from_run(config: Config, folder: RunStorage) -> Config:
    """Return the config with the absolute location of a checkpoint in `from_run`.

    Of a run it is the newest checkpoint. A run that has begun keeps the one that it began with.

    Raises:
        UserError: There is no such run, or it has no checkpoint.
    """
    if config.from_run is None:
        return config
    source, name = _split(config.from_run)
    saved = folder.read("config.yaml")
    if saved is not None and name is None:
        begun = Config.from_run_yaml(saved.decode(errors="replace"), f"{folder}/config.yaml")
        if begun.from_run and _split(begun.from_run)[0] == source:
            return config.model_copy(update={"from_run": begun.from_run})
    if name is None:
        newest = CheckpointStore(*RunStorage.existing(source.uri).open()).newest()
        if newest is None:
            raise UserError(f"from_run {source} has no checkpoint yet: train it further.")
        name = newest.name
    location = source.subfolder(CHECKPOINTS).subfolder(name).uri
    return config.model_copy(update={"from_run": location})


def initial_state(config: Config, dataset: Dataset, console: Console) -> dict[str, Any]:
    """Return the state of a run before its first step, with the networks of a resolved `from_run`.

    With another condition, or other classes, the layers of classes begin with random weights.

    Raises:
        UserError: The run or its checkpoint is missing or damaged, or its networks differ.
    """
    from cl_ray.gan import ContrastiveGAN  # imports torch

    source, name = _split(str(config.from_run))
    checkpoints = CheckpointStore(*RunStorage.existing(source.uri).open())
    hint = f"Begin with the one before, `--from-run {source}/{CHECKPOINTS}/"
    state = checkpoints.load(str(name), hint)
    partition = Partition(dataset, config, config.worker_range[0])
    trained = Config.from_yaml(state["config"], f"{source}, {name}")
    fixed = (*marked_fields(Config, "architecture"), "losses.form")
    pairs = {
        field: pair
        for field, pair in differences(trained, config).items()
        if field.startswith(fixed) and field not in WITHOUT_WEIGHTS
    }
    shape, classes = dataset.info.shape, partition.classes
    if state["shape"] != list(shape):
        pairs["shape of the images"] = state["shape"], list(shape)
    if pairs:
        shown = "; ".join(f"{field} is {a!r} there, {b!r} here" for field, (a, b) in pairs.items())
        raise UserError(
            f"from_run {source} has other networks ({shown}): give this run the same, or leave "
            "--from-run out."
        )
    networks = {part: state["gan"][part] for part in _NETWORKS}
    renewed = (trained.condition, state["classes"]) != (config.condition, classes)
    if renewed:
        print_line(
            console,
            f"from_run {source} has another condition or other classes: layers of classes begin "
            "with random weights.",
        )
        networks = {part: _without_class_layers(weights) for part, weights in networks.items()}
    dtype = next(iter(networks["generator"].values())).dtype
    gan = ContrastiveGAN(config, shape, dtype=dtype, classes=classes)
    for part, weights in networks.items():
        getattr(gan, part).load_state_dict(weights, strict=not renewed)
    gan.ema_steps = 0 if renewed else state["gan"].get("ema_steps", state["gan"]["steps"])
    return {
        "gan": gan.state_dict(),
        "prior": None,
        "prior_step": 0,
        "epochs": 0,
        "position": 0,
        "sums": {},
        "workers": partition.workers,
        "config": config.to_yaml(),
        "data": dataset.info.fingerprint,
        "shape": list(shape),
        "classes": classes,
        "counts": partition.counts,
        "predicted_labels": dataset.info.predicted_labels,
    }


def _without_class_layers(weights: dict[str, "Tensor"]) -> dict[str, "Tensor"]:
    return {name: value for name, value in weights.items() if not name.startswith(_CLASS_LAYERS)}


def _split(location: str) -> tuple[RunStorage, str | None]:
    """Return the run folder at a path or URI, and the checkpoint if it is that of one."""
    folder = RunStorage.from_uri(location)
    parent = folder.storage.partition("?")[0].rstrip("/")
    if not parent.endswith(f"/{CHECKPOINTS}") or folder.read("config.yaml") is not None:
        return folder, None
    return RunStorage.from_uri(RunStorage.from_uri(folder.storage).storage), folder.name
