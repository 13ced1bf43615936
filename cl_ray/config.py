"""The one config tree: presets, YAML in and out, and what may change when a run goes on.

Each part is owned by the room that it configures; nothing here imports torch or ray, so a
mistake in a config is answered at once.
"""

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from cl_ray.errors import UserError
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.train_config import TrainerConfig

Precision = Literal["auto", "float32", "bfloat16", "float64"]
Device = Literal["auto", "cpu", "cuda", "mps"]


class UniqueKeys(yaml.SafeLoader):
    """YAML whose mappings name each key once: of two, the last would count without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As its parent, which merges `<<` first.

        Raises:
            yaml.constructor.ConstructorError: A key is there twice.
        """
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"{key.value!r} is there twice", problem_mark=key.start_mark
                )
            if isinstance(key, yaml.ScalarNode):
                seen.add(key.value)
        return dict(super().construct_mapping(node, deep))


class Config(TrainerConfig):
    """Everything that decides what a run computes. The defaults are the preset `quick`."""

    preset: str = Field("quick", description="Named settings that this config started from.")
    name: str | None = Field(
        None, description="The run's name; the same name goes on. None makes a fresh one."
    )
    storage: str = Field(
        "runs",
        min_length=1,
        description="Folder or URI (s3://, gs://, ...) under which the run folder lies.",
    )
    data: str = Field(
        "mnist",
        min_length=1,
        description="`mnist` (packaged) or a folder or URI that `cl-ray data` wrote.",
    )
    workers: int | tuple[int, int] = Field(
        1, description="Worker processes; two numbers (least, most) make the run elastic."
    )
    cpus_per_worker: float | None = Field(
        None, gt=0, description="CPUs of each worker; None shares out what the machine has."
    )
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="GPUs of each worker, a fraction allowed. None: a local machine's GPUs are "
        "shared out; on a cluster none is used unless asked for.",
    )
    device: Device = Field("auto", description="Where a worker computes.")
    precision: Precision = Field(
        "auto", description="auto: bfloat16 autocast where the processor has it, else float32."
    )
    threads: int | None = Field(
        None, ge=1, description="CPU threads a worker; None is its CPUs, rounded down."
    )
    evaluation: EvaluationConfig = EvaluationConfig()

    @property
    def supervision(self) -> str:
        """What labels the training sees, in words; empty for none."""
        used = [f"pairs by {self.pairs.mode}"] if self.pairs.mode == "labels" else []
        used += [f"condition {self.condition}"] if self.condition != "none" else []
        return ", ".join(used)

    @property
    def worker_range(self) -> tuple[int, int]:
        """The least and the most workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _fits_together(self) -> "Config":
        least, most = self.worker_range
        if not 1 <= least <= most:
            raise ValueError(f"workers {self.workers} must be 1 or more, the least number first")
        unit = math.lcm(*range(least, most + 1))  # what every number of workers divides
        for workers in range(least, most + 1):
            if self.batch_size % workers:
                nearest = max(unit, round(self.batch_size / unit) * unit)
                raise ValueError(
                    f"batch_size {self.batch_size} cannot be divided among {workers} workers: "
                    f"take {nearest} or another multiple of {unit}"
                )
        gpus = self.gpus_per_worker or 0
        if gpus > 1 and gpus % 1:
            raise ValueError(f"gpus_per_worker {gpus:g} must be a whole number or less than 1")
        if gpus and self.device not in ("auto", "cuda"):
            raise ValueError(
                f"gpus_per_worker {gpus:g} is of no use to device {self.device!r}: leave one out"
            )
        if self.condition == "classifier" and not self.losses.classification:
            raise ValueError(
                "condition 'classifier' learns classes by losses.classification, and that is 0: "
                "raise it"
            )
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is unknown; there are: {', '.join(PRESETS)}")
        if self.name is not None:
            check_name(self.name)
        return self

    @classmethod
    def from_yaml(
        cls, text: str, where: str = "the config", base: "Config | None" = None
    ) -> "Config":
        """Read YAML that names all or some of the fields; the others come from `base`.

        If it names another preset than the base's, they come from that preset.

        Raises:
            UserError: The text is no YAML mapping, or a field is unknown or out of its range.
        """
        try:
            fields = yaml.load(text, UniqueKeys) or {}
        except yaml.YAMLError as error:
            raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(fields, dict):
            raise UserError(f"{where} must be a mapping of fields to values.")
        named = str(fields.get("preset", base.preset if base else "quick"))
        if base is None or named != base.preset:
            base = preset(named)
        return build(merge(base.model_dump(), fields), where)

    @classmethod
    def load(cls, path: str | Path, base: "Config | None" = None) -> "Config":
        """Read a YAML file, by its path or URI; see `from_yaml`.

        Raises:
            UserError: It cannot be read, or as in `from_yaml`.
        """
        try:
            text = _text_at(str(path)) if "://" in str(path) else Path(path).read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"The config {path} is not UTF-8 text (byte {error.object[error.start]:#04x} at "
                f"{error.start}): save it in that encoding."
            ) from error
        except OSError as error:
            why = " ".join((error.strerror or str(error)).split()).rstrip(".")
            raise UserError(f"Cannot read the config {path}: {why}.") from error
        return cls.from_yaml(text, str(path), base)


def _text_at(uri: str) -> str:
    """What lies in an object store, say."""
    from cl_ray.data.dataset import open_filesystem  # pyarrow

    filesystem, path = open_filesystem(uri)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read()).decode()


PRESETS: dict[str, dict[str, Any]] = {
    "quick": {},
    "mnist": {
        "epochs": 16,
        "generator": {"latent_noise_std": 0.35},
        "discriminator": {"hidden": 1024},
        "losses": {"uniformity": 5.0},
        "optimizer": {"average": 0.999, "decay": 0.5},
    },
}
"""Each preset as its differences from the defaults: `quick` takes minutes on two CPU cores,
`mnist` is the full run."""


def check_name(name: str, field: str = "name") -> None:
    """See that a run or a search may be called so.

    Raises:
        ValueError: Its folder would lie elsewhere than right under the storage.
    """
    if not name or name.startswith(".") or set(name) & set("/\\ \t\n:?#"):
        raise ValueError(
            f"{field} {name!r} must be one plain folder name: any characters but spaces and "
            "/ \\ : ? #, and no dot as the first one"
        )


def preset(name: str) -> Config:
    """The config of a preset.

    Raises:
        UserError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; there are: {', '.join(PRESETS)}.")
    return Config.model_validate({**PRESETS[name], "preset": name})


def build(fields: dict[str, Any], where: str = "the config") -> Config:
    """A checked config of plain fields.

    Raises:
        UserError: One sentence that names the first wrong field, its value and what is allowed.
    """
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"In {where}: {explain(error)}.") from error


def explain(error: ValidationError, within: str = "") -> str:
    """The first complaint of a validation in words a user can act on.

    Args:
        error: What pydantic says.
        within: The section that was validated, as `optimizer.`; empty for the whole.
    """
    first = error.errors()[0]
    field = within + ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("int", "tuple"))
    )
    if first["type"] == "extra_forbidden":
        tree = Config().model_dump()
        near = difflib.get_close_matches(field, [*tree, *(name for name, _ in leaves(tree))], 1)
        nearest = f"the nearest is {near[0]!r}; " if near else ""
        return (
            f"there is no field {field!r} ({nearest}see `cl-ray train --help` for those there are)"
        )
    if first["type"] in ("model_type", "dict_type"):
        return f"{field} {first['input']!r} is refused: it is a section, with fields of its own"
    if first["type"] == "string_too_short":
        return f"{field} is empty: give it a value"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{field} {first['input']!r} is refused: {first['msg'][0].lower()}{first['msg'][1:]}"


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the leaves that `changes` names replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Dotted field name to (old, new) for every leaf that differs."""
    ours, theirs = dict(leaves(old.model_dump())), dict(leaves(new.model_dump()))
    return {k: (ours[k], theirs[k]) for k in ours if ours[k] != theirs[k]}


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values of a tree by their dotted names."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
