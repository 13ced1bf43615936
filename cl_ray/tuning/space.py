"""The search space: which fields of the config are searched, their ranges, and when they apply.

A space is a YAML file that names one field of the config in each entry. The files in
`cl_ray/tuning/spaces/` ship with the package; `template.yaml` there explains the format.
"""

import contextlib
import difflib
import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cl_ray.base_config import BaseConfig, marked_fields
from cl_ray.config import (
    WITHOUT_WEIGHTS,
    Config,
    build_config,
    explain_validation_error,
    leaves,
    merge,
)
from cl_ray.errors import UserError, yaml_error_reason

if TYPE_CHECKING:
    import optuna

Values = dict[str, Any]
"""A value for each searched field, by its dotted name."""

_SPACES = Path(__file__).parent / "spaces"
_FORMAT = f"{_SPACES / 'template.yaml'} explains the format."
_INITIAL_CHANGES: list[Values] = [{}, {"optimizer.lr_g": 3e-3, "optimizer.lr_d": 3e-3}]
"""Settings known to work, as changes to the config. A search tries them first."""


class Parameter(BaseConfig):
    """The range of one field."""

    kind: Literal["log", "float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    step: int = Field(1, ge=1)
    values: list[str | bool | int | float | None] | None = None
    at_most: str | None = None
    when: dict[str, Any] = Field({})

    @field_validator("values", "when", mode="before")
    @classmethod
    def _parse_numbers(cls, given: Any) -> Any:
        return _parse_numbers(given)

    @model_validator(mode="after")
    def _check_range(self) -> "Parameter":
        if self.kind == "choice":
            if not self.values or (self.low, self.high) != (None, None):
                raise ValueError("a choice takes values: [...], at least one, and no low or high")
            if len(set(map(repr, self.values))) < len(self.values):
                raise ValueError(f"values {self.values} names one of them twice")
            if self.at_most:
                raise ValueError("at_most is for numbers: a choice has no upper end")
            return self
        if self.low is None or self.high is None or self.values is not None:
            raise ValueError(f"{self.kind} takes low and high, and no values")
        if self.low >= self.high:
            raise ValueError(f"the range from low {self.low:g} to high {self.high:g} is empty")
        if self.step != 1 and self.kind != "int":
            raise ValueError(f"step is for int: {self.kind} has none")
        if self.kind == "log" and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be more than 0 for log")
        if self.kind == "int" and (self.low % 1 or self.high % 1):
            raise ValueError(f"low {self.low:g} and high {self.high:g} must be whole numbers")
        return self

    @property
    def depends_on(self) -> list[str]:
        """The fields that its range or its condition refers to."""
        return [*self.when, *([self.at_most] if self.at_most else [])]

    def is_active(self, values: Values) -> bool:
        """Return whether its `when` holds where the config has these values."""
        return all(values[field] in _as_list(wanted) for field, wanted in self.when.items())

    def bounds(self) -> list[Any]:
        """Return the two ends of the range, or all values of a choice."""
        if self.kind == "choice":
            return list(self.values or ())
        assert self.low is not None
        assert self.high is not None
        return [int(end) if self.kind == "int" else end for end in (self.low, self.high)]

    def contains(self, value: Any) -> bool:
        """Return whether the value can be drawn."""
        if self.kind == "choice":
            return value in (self.values or ())
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        low, high = self.bounds()
        return low <= value <= high and (self.kind != "int" or not (value - low) % self.step)

    def allows(self, value: Any, others: Values) -> bool:
        """Return whether the value can be drawn where other fields have these values."""
        return self.contains(value) and not (self.at_most and value > others[self.at_most])

    def distribution(self) -> "optuna.distributions.BaseDistribution":
        """Return the whole range as an Optuna distribution."""
        from optuna import distributions

        if self.kind == "choice":
            return distributions.CategoricalDistribution(self.bounds())
        low, high = self.bounds()
        if self.kind == "int":
            high -= (high - low) % self.step
            return distributions.IntDistribution(low, high, step=self.step)
        return distributions.FloatDistribution(low, high, log=self.kind == "log")


class Space(BaseConfig):
    """The searched fields with their ranges; each comes after those that it depends on."""

    parameters: dict[str, Parameter]

    @classmethod
    def from_yaml(cls, text: str, where: str = "the space") -> "Space":
        """Parse a space.

        Raises:
            UserError: The text is not a YAML mapping, or a range is empty or malformed.
        """
        try:
            fields = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{where} is not YAML: {yaml_error_reason(error)}.") from error
        if not isinstance(fields, dict) or not fields:
            raise UserError(
                f"{where} must be a mapping of one or more fields to their ranges. {_FORMAT}"
            )
        parameters = {}
        for field, given in fields.items():
            try:
                parameters[str(field)] = Parameter.model_validate(given)
            except ValidationError as error:
                raise UserError(f"In {where}, {field}: {_explain(error)}. {_FORMAT}") from error
        return cls(parameters=_sort_by_dependency(parameters, where))

    @classmethod
    def load(cls, name: str) -> "Space":
        """Load a space by its name in `cl_ray/tuning/spaces/`, or from a YAML file.

        Raises:
            UserError: There is no such file, or as in `from_yaml`.
        """
        shipped = _SPACES / f"{name}.yaml"
        path = shipped if Path(name).name == name and shipped.is_file() else Path(name)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or error
            names = ", ".join(sorted(file.stem for file in _SPACES.glob("*.yaml")))
            raise UserError(
                f"Cannot read the space {name}: {reason}. Give a YAML file, or one of {names}."
            ) from error
        return cls.from_yaml(text, name)

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_yaml` reads back, without the defaults."""
        return {f: p.model_dump(exclude_defaults=True) for f, p in self.parameters.items()}

    def check(self, base: Config, where: str = "the space") -> None:
        """Check that the config accepts every value that may be drawn.

        Raises:
            UserError: A field is unknown or must not be searched, or a value is refused.
        """
        for field in self.parameters:
            for fixed, reason in marked_fields(Config, "not_searchable").items():
                if field == fixed or field.startswith(f"{fixed}."):
                    raise UserError(f"In {where}: {field} cannot be searched: {reason}.")
        try:
            for check in (self._check_names, self._check_at_most, self._check_values):
                for field in self.parameters:
                    check(field, base, where)
        except UserError as error:
            raise UserError(f"{error} {_FORMAT}") from error

    def _check_names(self, field: str, base: Config, where: str) -> None:
        known, parameter = dict(leaves(base.model_dump())), self.parameters[field]
        if field not in known:
            raise UserError(
                f"In {where}: there is no field {field!r} in the config "
                f"(the nearest is {_nearest(field, known)!r})."
            )
        for other in parameter.depends_on:
            if other not in known:
                raise UserError(
                    f"In {where}, {field}: it depends on {other!r}, which is no field of the "
                    f"config (the nearest is {_nearest(other, known)!r})."
                )
        for other, wanted in parameter.when.items():
            searched = self.parameters.get(other)
            for value in _as_list(wanted):
                if not (searched.contains(value) if searched else value == known[other]):
                    raise UserError(
                        f"In {where}, {field}: {other} is never {value!r}, as its `when` "
                        "requires: search that too, or leave it out."
                    )

    def _check_values(self, field: str, base: Config, where: str) -> None:
        known, parameter = dict(leaves(base.model_dump())), self.parameters[field]
        values = parameter.bounds()
        if parameter.kind in ("log", "float"):  # the ends alone may be whole numbers
            values.append(values[0] + (values[1] - values[0]) * 0.377)
        for value in values:
            apply_values(base, self._values_with(field, value, known), f"{where}, {field}")

    def contains(self, values: Values) -> bool:
        """Return whether each value is of a field of the space, and in its range."""
        return all(f in self.parameters and self.parameters[f].contains(values[f]) for f in values)

    def suggest(self, trial: "optuna.Trial", base: Config) -> Values:
        """Draw a value for each active field from an Optuna trial."""
        own = dict(leaves(base.model_dump()))
        drawn: Values = {}
        for field, parameter in self.parameters.items():
            current = {**own, **drawn}
            if not parameter.is_active(current):
                continue
            if parameter.kind == "choice":
                drawn[field] = trial.suggest_categorical(field, parameter.bounds())
                continue
            low, high = parameter.bounds()
            if parameter.at_most:
                high = min(high, current[parameter.at_most])
            if parameter.kind == "int":
                high -= (high - low) % parameter.step
                drawn[field] = trial.suggest_int(field, low, high, step=parameter.step)
            else:
                drawn[field] = trial.suggest_float(field, low, high, log=parameter.kind == "log")
        return drawn

    def initial_points(self, base: Config) -> list[Values]:
        """Return the settings known to work that lie in the space, each once."""
        own = dict(leaves(base.model_dump()))
        points: list[Values] = []
        for changes in _INITIAL_CHANGES:
            full = {**own, **changes}
            point = {
                field: full[field]
                for field, parameter in self.parameters.items()
                if parameter.allows(full[field], full) and parameter.is_active(full)
            }
            if point and point not in points:
                points.append(point)
        return points

    def hparams(self, config: Config) -> dict[str, bool | float | str]:
        """Return the value that each field has in a config, whether it is active there or not.

        A field's values are of one type in all configs, as TensorBoard's HPARAMS compares them.
        """
        own, defaults = (dict(leaves(c.model_dump())) for c in (config, Config()))
        found: dict[str, bool | float | str] = {}
        for field, parameter in self.parameters.items():
            inactive = [defaults[field]] if parameter.when else []  # which may be None
            kinds = {float if type(v) is int else type(v) for v in [*parameter.bounds(), *inactive]}
            same = len(kinds) == 1 and not kinds & {type(None)}
            found[field] = own[field] if same else str(own[field])
        return found

    def perturb(self, values: Values, base: Config, rng: random.Random) -> Values:
        """Multiply each real number by 0.8 or 1.25, within its range; keep the architecture.

        Source: Jaderberg et al. (2017), section 4.1, "perturb".
        """
        perturbed, fixed = dict(values), tuple(marked_fields(Config, "architecture"))
        own = dict(leaves(base.model_dump()))
        for field, parameter in self.parameters.items():  # those of `at_most` come first
            if field in values and parameter.kind in ("log", "float"):
                low, high = parameter.bounds()
                if parameter.at_most:
                    high = min(high, {**own, **perturbed}[parameter.at_most])
                if not field.startswith(fixed) or field in WITHOUT_WEIGHTS:
                    factor = rng.choice([0.8, 1.25])
                    perturbed[field] = min(max(values[field] * factor, low), high)
        return perturbed

    def _values_with(self, field: str, value: Any, own: Values) -> Values:
        """Return a point that has this value; other fields as in the config, or at their low."""
        fixed: Values = {field: value}
        for name in (field, *reversed(self.parameters)):  # dependencies come first in parameters
            if name in fixed and name in self.parameters:
                for other, wanted in self.parameters[name].when.items():
                    fixed.setdefault(other, _as_list(wanted)[0])
        values: Values = {}
        for name, parameter in self.parameters.items():
            current = {**own, **values, **fixed}
            if name in fixed:
                values[name] = fixed[name]
            elif parameter.is_active(current):
                allowed = parameter.allows(own[name], current)
                values[name] = own[name] if allowed else parameter.bounds()[0]
        return values

    def _check_at_most(self, field: str, base: Config, where: str) -> None:
        known, parameter = dict(leaves(base.model_dump())), self.parameters[field]
        if not parameter.at_most:
            return
        bound = self.parameters.get(parameter.at_most)
        values = bound.bounds() if bound else []
        if not bound or bound.when:  # it is the config's own where it is not searched
            values.append(known[parameter.at_most])
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        low = parameter.bounds()[0]
        if len(numbers) < len(values) or min(numbers) < low:
            raise UserError(
                f"In {where}, {field}: the range is empty where {parameter.at_most} is "
                f"{min(numbers) if numbers else values[0]}: lower {field}'s low {low:g}."
            )


def apply_values(base: Config, values: Values, where: str = "the trial's values") -> Config:
    """Return the config with these values.

    Raises:
        UserError: They do not go together.
    """
    return build_config(merge(base.model_dump(), unflatten(values)), where)


def unflatten(values: Values) -> dict[str, Any]:
    """Return dotted names as a tree, as `merge` takes it."""
    tree: dict[str, Any] = {}
    for field, value in values.items():
        *parts, last = field.split(".")
        branch = tree
        for part in parts:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def _sort_by_dependency(parameters: dict[str, Parameter], where: str) -> dict[str, Parameter]:
    """Put fields after those that they depend on, else keep the order given."""
    ordered: dict[str, Parameter] = {}
    left = dict(parameters)
    while left:
        ready = [f for f, p in left.items() if not any(other in left for other in p.depends_on)]
        if not ready:
            raise UserError(f"In {where}: {', '.join(left)} depend on each other in a circle.")
        ordered |= {field: left.pop(field) for field in ready}
    return ordered


def _as_list(wanted: Any) -> list[Any]:
    """Return the values that a `when` accepts."""
    return wanted if isinstance(wanted, list) else [wanted]


def _parse_numbers(given: Any) -> Any:
    """Convert strings that are numbers: YAML reads 1e-3 as a string."""
    if isinstance(given, dict):
        return {key: _parse_numbers(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_parse_numbers(value) for value in given]
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            return float(given)
    return given


def _nearest(field: str, known: Iterable[str]) -> str:
    return (difflib.get_close_matches(field, known, 1, 0.0) or [""])[0]


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    if not first["loc"] and first["type"] == "model_type":
        return f"{first['input']!r} is no range"
    if first["type"] == "missing":
        return f"it has no {first['loc'][0]}"
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(Parameter.model_fields)
        return f"{first['loc'][-1]!r} is not known; a range has {allowed}"
    return explain_validation_error(error)
