"""The base of every part of the config, and marks on its fields."""

from collections.abc import Iterator
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

Mark = Literal["changeable_on_resume", "not_searchable", "launch_only"]
"""What other code asks of a field: may a resumed run change it, may a search not vary it, does it
only decide how a run is launched."""


class BaseConfig(BaseModel):
    """A frozen record that refuses unknown fields, NaN and Inf."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_yaml(self) -> str:
        """Return all fields as YAML, nested parts as mappings."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def marks(*names: Mark) -> dict[str, Any]:
    """Return marks for `Field(json_schema_extra=marks(...))`."""
    return {"marks": list(names)}


def marked_fields(config: type[BaseConfig], mark: Mark, prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of the fields that carry a mark, those of nested parts included.

    A mark on a part (`pairs`) stands for all of its fields.
    """
    for name, field in config.model_fields.items():
        extra = field.json_schema_extra
        if isinstance(extra, dict) and mark in extra.get("marks", []):  # type: ignore[operator]
            yield f"{prefix}{name}"
        elif isinstance(field.annotation, type) and issubclass(field.annotation, BaseConfig):
            yield from marked_fields(field.annotation, mark, f"{prefix}{name}.")
