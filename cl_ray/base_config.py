"""The base of every part of the config."""

from pydantic import BaseModel, ConfigDict


class BaseConfig(BaseModel):
    """A frozen record that refuses unknown fields and keeps its docstrings beside its fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
