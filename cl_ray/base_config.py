"""The base class of all configs, marks on their fields, and the version of saved files."""

from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, ValidationInfo, field_validator

from cl_ray.errors import UserError
from cl_ray.uri import uri_problem

FORMAT_VERSION = 5
"""Version of the files of runs, checkpoints and searches. A file without one has version 1."""

Mark = Literal["changeable_on_resume", "not_searchable", "architecture"]
"""A property of a field that other modules ask for.

- `changeable_on_resume`: a resumed run or search may have another value.
- `not_searchable`: a search space must not contain the field; the mark's text says why.
- `architecture`: the weights of a network do not fit another value of the field.
"""


class BaseConfig(BaseModel):
    """A frozen record that refuses unknown fields, NaN, Inf and URIs that may hold a secret.

    The field `study` is the URL of a database.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )

    @field_validator("*")
    @classmethod
    def _check_uri(cls, value: Any, info: ValidationInfo) -> Any:
        is_study = info.field_name == "study"
        if isinstance(value, str) and (problem := uri_problem(value, is_study)):
            raise ValueError(f"{info.field_name} {problem}")
        return value

    def to_yaml(self) -> str:
        """Return all fields as YAML, nested parts as mappings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def marks(*names: Mark, not_searchable: str | None = None) -> dict[str, Any]:
    """Return marks for `Field(json_schema_extra=marks(...))`.

    `not_searchable` adds that mark, with the reason as its text.
    """
    given = dict.fromkeys(names, "")
    if not_searchable:
        given["not_searchable"] = not_searchable
    return {"marks": given}


def marked_fields(config: type[BaseConfig], mark: Mark, prefix: str = "") -> dict[str, str]:
    """Return the dotted names of the fields that carry a mark, with the mark's text.

    A mark on a part (`evaluation`) stands for all of its fields. The fields of other parts are
    searched as well.
    """
    found: dict[str, str] = {}
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        given: Any = extra.get("marks", {}) if isinstance(extra, dict) else {}
        if mark in given:
            found[f"{prefix}{name}"] = given[mark]
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseConfig):
            found |= marked_fields(field.annotation, mark, f"{prefix}{name}.")
    return found


def check_format_version(version: object, what: str) -> None:
    """Check the format version that a saved file states.

    Args:
        version: The file's `format_version`; 1 if it has none.
        what: What was saved, as the start of a sentence, such as `The run runs/a`.

    Raises:
        UserError: It is not `FORMAT_VERSION`.
    """
    if version == FORMAT_VERSION:
        return
    newer = isinstance(version, int) and version > FORMAT_VERSION
    raise UserError(
        f"{what} was written by {'a later' if newer else 'an earlier'} version of cl_ray (format "
        f"{version}); this version reads format {FORMAT_VERSION}: use that version of cl_ray, or "
        "start again under another --name."
    )
