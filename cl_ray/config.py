"""The config tree of a run: presets, and YAML in and out.

Each part is defined beside the code that it configures. Nothing here imports torch or ray, so
that a wrong config is reported at once.
"""

import difflib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from cl_ray.base_config import FORMAT_VERSION, BaseConfig, check_format_version, marks
from cl_ray.errors import UserError, pluralize, printable, yaml_error_reason
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.train_config import TrainerConfig

Precision = Literal["auto", "float32", "bfloat16", "float64"]
Device = Literal["auto", "cpu", "cuda", "mps"]
MAX_NAME_BYTES = 230
"""Longest name of a run or a search in UTF-8. A file's name has 255 bytes, and some files have the
name with something before and after it."""


WITHOUT_WEIGHTS = ("generator.latent_noise_std", "generator.prior_codes")
"""Fields of the networks' configs that their weights do not depend on."""


class RunIdentityConfig(BaseConfig):
    """What a run is called, where it is stored and which data it trains on."""

    preset: str = Field(
        "quick",
        description="Named settings that the config starts from.",
        json_schema_extra=marks(not_searchable="a preset is many fields: name those"),
    )
    name: str | None = Field(
        None,
        description="Name of the run; an existing run is resumed. None: a new name.",
        json_schema_extra=marks(
            "changeable_on_resume", not_searchable="the search names its trials"
        ),
    )
    data: str = Field(
        "mnist",
        min_length=1,
        description="`mnist` (packaged), or a folder or URI that `cl-ray data` wrote.",
        # On resume it may lie elsewhere: its fingerprint must be the same.
        json_schema_extra=marks(
            "changeable_on_resume", not_searchable="trials on other data are not comparable"
        ),
    )
    storage: str = Field(
        "runs",
        min_length=1,
        description="Folder or URI (s3://, gs://, ...) that contains the run folder.",
        json_schema_extra=marks(
            "changeable_on_resume", not_searchable="the search stores its trials"
        ),
    )


class Config(TrainerConfig, RunIdentityConfig):
    """Everything that decides what a run computes, and on what. The defaults are preset `quick`."""

    workers: int | tuple[int, int] = Field(
        1,
        description="Worker processes; two numbers (minimum, maximum) make the run elastic.",
        json_schema_extra=marks(
            "changeable_on_resume", not_searchable="--workers is the same for all trials"
        ),
    )
    cpus_per_worker: float | None = Field(
        None,
        gt=0,
        description="CPUs of each worker. None: all CPUs of a local machine, divided among the "
        "workers; 1 on a cluster.",
        json_schema_extra=marks(
            "changeable_on_resume", not_searchable="--cpus-per-trial is the same for all trials"
        ),
    )
    gpus_per_worker: float | None = Field(
        None,
        ge=0,
        description="GPUs of each worker: 1, or a fraction that workers share. None: on a local "
        "machine one each, or a fraction where there are fewer than workers; 0 on a cluster.",
        json_schema_extra=marks(
            "changeable_on_resume", not_searchable="--gpus-per-trial is the same for all trials"
        ),
    )
    device: Device = Field("auto", description="Device of each worker.")
    precision: Precision = Field(
        "auto", description="auto: bfloat16 autocast where the processor has it, else float32."
    )
    threads: int | None = Field(
        None,
        ge=1,
        description="CPU threads of each worker. None: its CPUs, rounded down.",
        json_schema_extra=marks(
            "changeable_on_resume", not_searchable="--cpus-per-trial is the same for all trials"
        ),
    )
    evaluation: EvaluationConfig = Field(
        EvaluationConfig(),
        json_schema_extra=marks(
            not_searchable="trials that are measured differently are not comparable"
        ),
    )

    from_run: str | None = Field(
        None,
        min_length=1,
        description="Run folder or URI. A new run begins with the networks of that run's last "
        "checkpoint, or of the one at `RUN/checkpoints/NAME`, to fine-tune them; a resumed run "
        "continues from its own.",
        json_schema_extra=marks(not_searchable="trials begin with random weights"),
    )

    @property
    def supervision(self) -> str:
        """Which labels the training uses, as text; empty for none."""
        used = [f"pairs by {self.pairs.mode}"] if self.pairs.mode == "labels" else []
        used += [f"condition {self.condition}"] if self.condition != "none" else []
        used += [pluralize(self.labels.count, "label")] if used and self.labels.count else []
        return ", ".join(used)

    @property
    def worker_range(self) -> tuple[int, int]:
        """The minimum and maximum number of workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _check_consistent(self) -> "Config":
        least, most = self.worker_range
        if not 1 <= least <= most:
            raise ValueError(f"workers {self.workers} must be 1 or more, of two the minimum first")
        unit, reasonable = 1, 64 * self.batch_size
        for workers in range(least, most + 1):  # divisible by every number of workers
            unit = math.lcm(unit, workers)
            if unit > reasonable:
                break
        for workers in range(least, most + 1):
            if self.batch_size % workers:
                nearest = max(unit, round(self.batch_size / unit) * unit)
                advice = f"use {nearest} or another multiple of {unit}"
                if unit > reasonable:
                    advice = "lower the maximum of workers"
                raise ValueError(
                    f"batch_size {self.batch_size} cannot be divided among {workers} workers: "
                    f"{advice}"
                )
        gpus = self.gpus_per_worker or 0
        if gpus > 1:
            raise ValueError(
                f"gpus_per_worker {gpus:g} is more than 1, and a worker computes on one GPU: take "
                "more workers"
            )
        if gpus and self.device not in ("auto", "cuda"):
            raise ValueError(
                f"gpus_per_worker {gpus:g} does not fit device {self.device!r}: leave one out"
            )
        if self.condition == "classifier" and not self.losses.classification:
            raise ValueError(
                "condition 'classifier' learns classes by losses.classification, which is 0: "
                "raise it"
            )
        if self.preset not in PRESETS:
            raise ValueError(f"preset {self.preset!r} is unknown; there are: {', '.join(PRESETS)}")
        if self.name is not None:
            check_name(self.name)
        return self

    def to_yaml(self) -> str:
        """Return the format version and all fields as YAML."""
        return f"format_version: {FORMAT_VERSION}\n{super().to_yaml()}"

    @classmethod
    def from_yaml(
        cls, text: str, where: str = "the config", base: "Config | None" = None
    ) -> "Config":
        """Read YAML that names some or all fields.

        Args:
            text: The YAML.
            where: Its origin, for error messages.
            base: The config that gives the other fields. If the YAML names another preset than
                the base's, or there is no base, the preset gives them.

        Raises:
            UserError: The text is not a YAML mapping, was written in another format, or a field
                is unknown or out of its range.
        """
        fields = _parse_fields(text, where)
        check_format_version(fields.pop("format_version", FORMAT_VERSION), where)
        named = str(fields.get("preset", base.preset if base else "quick"))
        if base is None or named != base.preset:
            base = preset(named)
        return build_config(merge(base.model_dump(), fields), where)

    @classmethod
    def from_run_yaml(cls, text: str, where: str) -> "Config":
        """Read the config.yaml that a run wrote; it must state its format version.

        Raises:
            UserError: It is empty or not a run's, or as `from_yaml`.
        """
        fields = _parse_fields(text, where)
        missing = [name for name in RunIdentityConfig.model_fields if name not in fields]
        if "format_version" in fields or not missing:
            check_format_version(fields.get("format_version", 1), where)
        if missing:
            what = f"it has no field {missing[0]!r}" if fields else "it is empty"
            raise UserError(
                f"{where} is not the config of a run: {what}; put back the run's own, or take "
                "another --name."
            )
        return cls.from_yaml(text, where)

    @classmethod
    def load(cls, path: str | Path, base: "Config | None" = None) -> "Config":
        """Read a YAML file, given by its path or URI, as `from_yaml` does.

        Raises:
            UserError: The file cannot be read, or as `from_yaml`.
        """
        try:
            is_uri = "://" in str(path)
            text = _read_uri(str(path)) if is_uri else Path(path).expanduser().read_text("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"The config {path} is not UTF-8 text (byte {error.object[error.start]:#04x} at "
                f"{error.start}): save it in that encoding."
            ) from error
        except OSError as error:
            reason = " ".join((error.strerror or str(error)).split()).rstrip(".")
            raise UserError(f"Cannot read the config {path}: {reason}.") from error
        return cls.from_yaml(text, str(path), base)


class LaunchOptions(BaseConfig):
    """How a run is started; none of it changes what is computed."""

    address: str | None = Field(
        None, description="Ray cluster to join. None: RAY_ADDRESS, or Ray on this machine."
    )
    dashboard: bool = Field(False, description="Start the Ray dashboard and print its address.")
    verbose: bool = Field(False, description="Show Ray's messages and the workers' output.")
    max_failures: int = Field(3, ge=0, description="How often workers that died are restarted.")
    from_checkpoint: str | None = Field(
        None, description="Checkpoint of the run to resume from; later ones are deleted."
    )


PHOTO_DEPTHS = {64: 4, 128: 5, 256: 6}
"""Levels that bring images of up to that many pixels to feature maps of 4 x 4."""
PRESETS: dict[str, dict[str, Any]] = {
    "quick": {},
    "mnist": {
        "epochs": 8,
        "discriminator": {"hidden": 1024},
        "optimizer": {"ema_decay": 0.999},
    },
    **{
        f"photos-{side}": {
            "epochs": 32,
            "generator": {"depth": depth, "latent": 64, "latent_noise_std": 0.35},
            "discriminator": {"depth": depth},
            "optimizer": {"ema_decay": 0.999},
        }
        for side, depth in PHOTO_DEPTHS.items()
    },
}
"""Each preset as its differences from the defaults: `quick` takes minutes on two CPU cores,
`mnist` is the full run, `photos-SIDE` is for images of up to that many pixels."""


def preset(name: str) -> Config:
    """Return the config of a preset.

    Raises:
        UserError: There is no preset of that name.
    """
    if name not in PRESETS:
        raise UserError(f"preset {name!r} is unknown; there are: {', '.join(PRESETS)}.")
    return Config.model_validate({**PRESETS[name], "preset": name})


def check_name(name: str, field: str = "name") -> None:
    """Check the name of a run or a search, which is also the name of its folder.

    Raises:
        ValueError: The folder would not lie directly under the storage, or its name is too long.
    """
    refused = set(name) & set("/\\:?#") or any(map(str.isspace, name)) or printable(name) != name
    if not name or name.startswith(".") or refused:
        raise ValueError(
            f"{field} {name!r} must be one plain folder name: any characters but spaces, control "
            "characters and / \\ : ? #, and no dot as the first one"
        )
    size = len(name.encode())
    if size > MAX_NAME_BYTES:
        raise ValueError(
            f"{field} {name!r} has {size} bytes in UTF-8, and the names of files leave room for "
            f"{MAX_NAME_BYTES}: shorten it"
        )


def build_config(fields: dict[str, Any], where: str = "the config") -> Config:
    """Build a config of plain fields.

    Raises:
        UserError: One sentence that names the first wrong field, its value and what is allowed.
    """
    try:
        return Config.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"In {where}: {explain_validation_error(error)}.") from error


def explain_validation_error(error: ValidationError, section: str = "") -> str:
    """Describe the first problem that pydantic found in a section, such as `optimizer.`."""
    first = error.errors()[0]
    field = section + ".".join(
        str(part) for part in first["loc"] if not str(part).startswith(("int", "tuple"))
    )
    if first["type"] == "extra_forbidden":
        tree = Config().model_dump()
        near = difflib.get_close_matches(field, [*tree, *(name for name, _ in leaves(tree))], 1)
        nearest = f"the nearest is {near[0]!r}; " if near else ""
        return f"there is no field {field!r} ({nearest}`cl-ray train --help` lists all fields)"
    # Of a wrong type, a URI is not checked, and a secret in it may contain any character.
    value = "***" if ":/" in str(first["input"]) else repr(first["input"])
    if first["type"] in ("model_type", "dict_type"):
        return f"{field} {value} is refused: it is a section, with fields of its own"
    if first["type"] == "string_too_short":
        return f"{field} is empty: give it a value"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    return f"{field} {value} is refused: {first['msg'][0].lower()}{first['msg'][1:]}"


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return nested fields with the leaves that `changes` names replaced."""
    merged = dict(base)
    for key, value in changes.items():
        old = merged.get(key)
        merged[key] = (
            merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
        )
    return merged


def differences(old: Config, new: Config) -> dict[str, tuple[Any, Any]]:
    """Return the dotted names of the fields that differ, each with its old and new value."""
    before, after = dict(leaves(old.model_dump())), dict(leaves(new.model_dump()))
    return {
        field: (before[field], after[field]) for field in before if before[field] != after[field]
    }


def leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted name and the value of every leaf of nested fields."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


class _UniqueKeyLoader(yaml.SafeLoader):
    """A YAML loader that refuses a repeated key, of which YAML would silently use the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in keys:
                    raise yaml.constructor.ConstructorError(
                        problem=f"{key.value!r} is there twice", problem_mark=key.start_mark
                    )
                keys.add(key.value)
        return dict(super().construct_mapping(node, deep))


def _parse_fields(text: str, where: str) -> dict[str, Any]:
    try:
        fields = yaml.load(text, _UniqueKeyLoader) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{where} is not YAML: {yaml_error_reason(error)}.") from error
    except ValueError as error:  # a date that does not exist, such as 2024-02-30
        raise UserError(f"{where} is not YAML: {error}.") from error
    if not isinstance(fields, dict):
        raise UserError(f"{where} must be a mapping of fields to values.")
    return fields


def _read_uri(uri: str) -> str:
    from cl_ray.storage import open_filesystem  # imports pyarrow

    filesystem, path = open_filesystem(uri)
    with filesystem.open_input_stream(path) as stream:
        return bytes(stream.read()).decode()
