"""What is searched: fields of the config, the range of each, and when it counts.

A space of your own is a YAML file that `--space` takes, one field of the config a line:

    optimizer.lr_g:       {kind: log, low: 0.0001, high: 0.01}
    discriminator.depth:  {kind: int, low: 2, high: 5}
    generator.depth:      {kind: int, low: 2, high: 5, at_most: discriminator.depth}
    losses.objective:         {kind: choice, values: [non-saturating, hinge, wasserstein]}
    losses.gradient_penalty:  {kind: log, low: 1, high: 30, when: {losses.objective: wasserstein}}
    losses.r1:                {kind: log, low: 0.1, high: 10,
                               when: {losses.objective: [non-saturating, hinge]}}

`log` and `float` are real numbers, `log` ones drawn evenly over their magnitudes; `int` are whole
ones, every `step`-th of them; `choice` is one of some values. `at_most` lowers the upper end to
another field's value; a field whose `when` does not hold, a value or one of several of every field
that it names, keeps the config's own value.
"""

import contextlib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator

from cl_ray.base_config import BaseConfig
from cl_ray.config import Config, build, explain, leaves, merge
from cl_ray.errors import UserError

Values = dict[str, Any]
"""A value for each field, by its dotted name."""

DEFAULT = """
optimizer.lr_g:         {kind: log, low: 0.0003, high: 0.01}
optimizer.lr_d:         {kind: log, low: 0.0001, high: 0.01}
optimizer.d_steps:      {kind: int, low: 1, high: 2}
optimizer.average:      {kind: choice, values: [0.99, 0.995, 0.998, 0.999]}
discriminator.depth:    {kind: int, low: 2, high: 5}
discriminator.width:    {kind: int, low: 16, high: 48, step: 8}
generator.depth:        {kind: int, low: 2, high: 5, at_most: discriminator.depth}
generator.width:        {kind: int, low: 16, high: 48, step: 8}
generator.latent_noise_std:       {kind: float, low: 0.1, high: 1}
losses.contrastive:     {kind: log, low: 0.1, high: 10}
losses.reconstruction:  {kind: log, low: 5, high: 200}
batch_size:             {kind: choice, values: [32, 64, 128]}
"""
"""The balance between G and D: how fast, how deep and how wide each is, how often D steps."""

KNOWN: list[Values] = [
    {},
    {"optimizer.lr_g": 1e-3, "optimizer.lr_d": 1e-3},
]
"""Settings known to work, as differences from the config: they are tried first."""

NOT_SEARCHABLE = {
    "name": "the search names its trials",
    "storage": "the search stores its trials",
    "data": "trials on other data are not comparable",
    "preset": "a preset is many fields: name those",
    "epochs": "--epochs is each trial's budget",
    "workers": "--workers is alike for all trials",
    "cpus_per_worker": "--cpus-per-trial is alike for all trials",
    "gpus_per_worker": "--gpus-per-trial is alike for all trials",
    "threads": "--cpus-per-trial is alike for all trials",
    "evaluation": "trials that are measured otherwise are not comparable",
    "checkpoint": "it changes nothing that is measured",
}
"""Fields that no space may name, and why."""


class Parameter(BaseConfig):
    """One field's range."""

    kind: Literal["log", "float", "int", "choice"]
    low: float | None = None
    high: float | None = None
    step: int = Field(1, ge=1)
    values: list[str | bool | int | float | None] | None = None
    at_most: str | None = None
    when: dict[str, Any] = Field({})

    @field_validator("values", "when", mode="before")
    @classmethod
    def _are_numbers(cls, given: Any) -> Any:
        return _numbers(given)

    @model_validator(mode="after")
    def _is_a_range(self) -> "Parameter":
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
        if self.kind == "log" and self.low <= 0:
            raise ValueError(f"low {self.low:g} must be more than 0 for log")
        if self.kind == "int" and (self.low % 1 or self.high % 1):
            raise ValueError(f"low {self.low:g} and high {self.high:g} must be whole numbers")
        return self

    def counts(self, values: Values) -> bool:
        """Whether it is searched where the config has these values."""
        return all(values[field] in _several(wanted) for field, wanted in self.when.items())

    def ends(self) -> list[Any]:
        """The values that a config must take for it to take all: both ends, or every choice."""
        if self.kind == "choice":
            return list(self.values or ())
        assert self.low is not None
        assert self.high is not None
        return [int(e) if self.kind == "int" else e for e in (self.low, self.high)]

    def holds(self, value: Any) -> bool:
        """Whether the value lies in the range."""
        low, high = self.ends()[0], self.ends()[-1]
        if self.kind == "choice":
            return value in (self.values or ())
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        return low <= value <= high and (self.kind != "int" or not (value - low) % self.step)

    def distribution(self) -> Any:
        """The whole range as Optuna knows it."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.kind == "choice":
            return CategoricalDistribution(self.ends())
        low, high = self.ends()
        if self.kind == "int":
            return IntDistribution(low, high - (high - low) % self.step, step=self.step)
        return FloatDistribution(low, high, log=self.kind == "log")


class Space(BaseConfig):
    """The fields that are searched, those that others depend on first."""

    parameters: dict[str, Parameter]

    @classmethod
    def from_yaml(cls, text: str, where: str = "the space") -> "Space":
        """Read a space.

        Raises:
            UserError: It is no YAML mapping, or a range is empty or not understood.
        """
        try:
            fields = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise UserError(f"{where} is not YAML: {' '.join(str(error).split())}.") from error
        if not isinstance(fields, dict) or not fields:
            raise UserError(f"{where} must be a mapping of one or more fields to their ranges.")
        parameters = {}
        for field, given in fields.items():
            try:
                parameters[str(field)] = Parameter.model_validate(given)
            except ValidationError as error:
                raise UserError(f"In {where}, {field}: {_explain(error)}.") from error
        return cls(parameters=_in_order(parameters, where))

    @classmethod
    def load(cls, path: str | Path) -> "Space":
        """Read a YAML file; see `from_yaml`."""
        try:
            text = Path(path).read_text()
        except OSError as error:
            raise UserError(f"Cannot read the space {path}: {error.strerror}.") from error
        return cls.from_yaml(text, str(path))

    def to_yaml(self) -> str:
        """What `from_yaml` reads back to an equal space."""
        return str(yaml.safe_dump(self.to_dict(), sort_keys=False))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the defaults left out."""
        return {f: p.model_dump(exclude_defaults=True) for f, p in self.parameters.items()}

    def check(self, base: Config, where: str = "the space") -> None:
        """See that the config takes every value that may be drawn.

        Raises:
            UserError: A field is unknown or not to be searched, or a value is refused.
        """
        known = dict(leaves(base.model_dump()))
        for field, parameter in self.parameters.items():
            owner = next(
                (o for o in NOT_SEARCHABLE if field == o or field.startswith(f"{o}.")), None
            )
            if owner:
                raise UserError(
                    f"In {where}: {field} is not to be searched: {NOT_SEARCHABLE[owner]}."
                )
            if field not in known:
                raise UserError(
                    f"In {where}: there is no field {field!r} in the config "
                    f"(the nearest is {_nearest(field, known)!r})."
                )
            for other in [*parameter.when, *([parameter.at_most] if parameter.at_most else [])]:
                if other not in known:
                    raise UserError(
                        f"In {where}, {field}: it depends on {other!r}, which is no field of the "
                        f"config (the nearest is {_nearest(other, known)!r})."
                    )
            for other, wanted in parameter.when.items():
                searched = self.parameters.get(other)
                for value in _several(wanted):
                    if not (searched.holds(value) if searched else value == known[other]):
                        raise UserError(
                            f"In {where}, {field}: {other} is never {value!r}, as its `when` asks: "
                            f"search that too, or leave it out."
                        )
            if parameter.at_most:
                self._check_bound(field, parameter, known, where)
            for value in parameter.ends():
                drawn = self._drawn_with(field, value, known)
                build(merge(base.model_dump(), nested(drawn)), f"{where}, {field}")

    def suggest(self, trial: Any, base: Config) -> Values:
        """Draw a value for each field that counts, from an Optuna trial."""
        own = dict(leaves(base.model_dump()))
        drawn: Values = {}
        for field, parameter in self.parameters.items():
            if not parameter.counts({**own, **drawn}):
                continue
            if parameter.kind == "choice":
                drawn[field] = trial.suggest_categorical(field, parameter.ends())
                continue
            low, high = parameter.ends()
            if parameter.at_most:
                high = min(high, {**own, **drawn}[parameter.at_most])
            if parameter.kind == "int":
                high -= (high - low) % parameter.step
                drawn[field] = trial.suggest_int(field, low, high, step=parameter.step)
            else:
                drawn[field] = trial.suggest_float(field, low, high, log=parameter.kind == "log")
        return drawn

    def known(self, base: Config) -> list[Values]:
        """The known good settings, as far as they lie in the space; each once."""
        own = dict(leaves(base.model_dump()))
        found: list[Values] = []
        for changes in KNOWN:
            full = {**own, **changes}
            point = {
                field: full[field]
                for field, parameter in self.parameters.items()
                if parameter.holds(full[field])
                and not (parameter.at_most and full[field] > full[parameter.at_most])
                and parameter.counts(full)
            }
            if point and point not in found:
                found.append(point)
        return found

    def perturbed(self, values: Values, random: Any) -> Values:
        """The same architecture with its rates, weights and other real numbers moved.

        Each is multiplied by 0.8 or 1.25 and kept within its range (Jaderberg et al., 2017,
        section 4.1, 'perturb').
        """
        moved = dict(values)
        for field, value in values.items():
            parameter = self.parameters.get(field)
            if parameter and parameter.kind in ("log", "float"):
                low, high = parameter.ends()
                if field.split(".")[0] not in ("generator", "discriminator"):
                    moved[field] = min(max(value * random.choice([0.8, 1.25]), low), high)
        return moved

    def _drawn_with(self, field: str, value: Any, own: Values) -> Values:
        """A draw with this value; other fields as the config has them, or at their lower end."""
        fixed: Values = {field: value}
        for known in (field, *reversed(self.parameters)):  # those that others depend on come first
            if known in fixed and known in self.parameters:
                for other, wanted in self.parameters[known].when.items():
                    fixed.setdefault(other, _several(wanted)[0])
        drawn: Values = {}
        for other, parameter in self.parameters.items():
            full = {**own, **drawn, **fixed}
            if other in fixed:
                drawn[other] = fixed[other]
            elif parameter.counts(full):
                fits = not parameter.at_most or own[other] <= full[parameter.at_most]
                drawn[other] = (
                    own[other] if parameter.holds(own[other]) and fits else (parameter.ends()[0])
                )
        return drawn

    def _check_bound(
        self, field: str, parameter: Parameter, known: dict[str, Any], where: str
    ) -> None:
        bound = self.parameters.get(str(parameter.at_most))
        values = bound.ends() if bound else [known[str(parameter.at_most)]]
        numbers = [v for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
        low = parameter.ends()[0]
        if len(numbers) < len(values) or min(numbers) < low:
            raise UserError(
                f"In {where}, {field}: the range is empty where {parameter.at_most} is "
                f"{min(numbers) if numbers else values[0]}: lower {field}'s low {low:g}."
            )


def configured(base: Config, values: Values) -> Config:
    """The config with these values.

    Raises:
        UserError: They do not go together.
    """
    return build(merge(base.model_dump(), nested(values)), "the trial's values")


def nested(values: Values) -> dict[str, Any]:
    """Dotted names to a tree."""
    tree: dict[str, Any] = {}
    for field, value in values.items():
        *parts, last = field.split(".")
        branch = tree
        for part in parts:
            branch = branch.setdefault(part, {})
        branch[last] = value
    return tree


def _in_order(parameters: dict[str, Parameter], where: str) -> dict[str, Parameter]:
    """Those that others depend on first, else as they were given."""
    ordered: dict[str, Parameter] = {}
    left = dict(parameters)
    while left:
        ready = [
            field
            for field, p in left.items()
            if not any(o in left for o in [*p.when, *([p.at_most] if p.at_most else [])])
        ]
        if not ready:
            raise UserError(f"In {where}: {', '.join(left)} depend on each other in a circle.")
        for field in ready:
            ordered[field] = left.pop(field)
    return ordered


def _several(wanted: Any) -> list[Any]:
    """What a `when` asks of a field: one value or a list of them."""
    return wanted if isinstance(wanted, list) else [wanted]


def _numbers(given: Any) -> Any:
    """The same with numbers for the strings that are some: YAML takes 1e-3 for a string."""
    if isinstance(given, dict):
        return {key: _numbers(value) for key, value in given.items()}
    if isinstance(given, list):
        return [_numbers(value) for value in given]
    if isinstance(given, str):
        with contextlib.suppress(ValueError):
            return float(given)
    return given


def _nearest(field: str, known: dict[str, Any]) -> str:
    from difflib import get_close_matches

    return (get_close_matches(field, known, 1, 0.0) or [""])[0]


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "extra_forbidden":
        allowed = ", ".join(Parameter.model_fields)
        return f"{first['loc'][-1]!r} is not known; a range has {allowed}"
    return explain(error)
