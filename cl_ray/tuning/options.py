"""The flags of a search, and which of them go together."""

from typing import Annotated, Any, Literal

import tyro
from pydantic import Field, model_validator

from cl_ray.base_config import BaseConfig, marks
from cl_ray.config import check_name
from cl_ray.uri import public_uri

Repeatable = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
"""A flag that may be given more than once."""


def _changeable(default: Any, description: str, **bounds: Any) -> Any:
    """Return a field that a resumed search may have another value of."""
    extra = marks("changeable_on_resume")
    return Field(default, description=description, json_schema_extra=extra, **bounds)


class SearchOptions(BaseConfig):
    """Search for the balance between G and D: Optuna proposes, Ray Tune runs the trials."""

    name: str | None = _changeable(None, "The search's name. None makes a fresh one.")
    resume: str | None = _changeable(
        None, "Resume the search of this name; a larger --trials adds to it."
    )
    storage: str = _changeable(
        "runs", "Folder or URI under which the search's folder lies.", min_length=1
    )
    trials: int = _changeable(
        12,
        "Trials in all, failed ones included; with scheduler pbt, the population.",
        ge=1,
        le=100_000,
    )
    epochs: int = Field(3, ge=1, description="Epochs of a trial that is not stopped early.")
    images: int | None = Field(
        4096,
        ge=100,
        description="Training images that trials see, rounded up to whole row groups; None is all "
        "of them.",
    )
    metric: Repeatable = Field(
        (),
        description="Evaluation metric to optimize, such as frechet, linear_probe or, with a "
        "condition, class_accuracy. Repeat it to optimize several metrics (Pareto front). "
        "None: frechet where it is available.",
    )
    sampler: Literal["tpe", "random", "nsga2"] = _changeable(
        "tpe", "Who proposes values: tree-structured Parzen estimator, uniform random, or NSGA-II."
    )
    scheduler: Literal["auto", "asha", "median", "none", "pbt"] = Field(
        "auto",
        description="Trial scheduler: asha (asynchronous successive halving) and median (median "
        "stopping rule) stop trials early, none does not, pbt is population-based training. "
        "auto: asha for one metric, none for several.",
    )
    concurrent: int | None = _changeable(
        None,
        "Trials at once. None: as many as fit, but about half of all with sampler tpe or nsga2.",
        ge=1,
    )
    workers: int = Field(
        1, ge=1, description="Workers of a trial; with more than one, each is a TorchTrainer."
    )
    cpus_per_trial: float | None = _changeable(
        None,
        "CPUs of a trial, divided among its workers. None: a local machine's CPUs are divided "
        "among the trials; on a cluster each worker has 1.",
        gt=0,
    )
    gpus_per_trial: float | None = _changeable(
        None,
        "GPUs of a trial, divided among its workers; a fraction is allowed. None: a local "
        "machine's GPUs are divided among the trials, at most one a worker; on a cluster none is "
        "used.",
        ge=0,
    )
    seed: int = _changeable(
        0, "Seed of the proposed values; trials train with the config's seed.", ge=0, lt=2**31
    )
    preset: str | None = Field(None, description="Preset that the space changes.")
    config: str | None = _changeable(
        None, "YAML file, or its URI, of the config that the space changes."
    )
    set: Repeatable = _changeable(
        (), "A field of that config, as `losses.temperature=0.1`; may be repeated."
    )
    space: str = _changeable(
        "balance", "What is searched: balance, rates, objectives, or a YAML file of your own."
    )
    data: str | None = Field(None, min_length=1, description="`mnist` or what `cl-ray data` wrote.")
    study: str | None = Field(
        None, description="Optuna storage URL, as sqlite:///s.db. None: study.log in the folder."
    )
    address: str | None = _changeable(None, "Ray cluster to join; None starts Ray here.")
    dashboard: bool = _changeable(False, "Start the Ray dashboard and print its address.")
    verbose: bool = _changeable(False, "Show Ray's messages and the trials' output.")

    @model_validator(mode="after")
    def _check_combinations(self) -> "SearchOptions":
        if self.name and self.resume and self.name != self.resume:
            raise ValueError(
                f"name {self.name!r} and resume {self.resume!r} are two searches: leave one out"
            )
        name = self.name if self.resume is None else self.resume
        if name is not None:
            check_name(name, "name" if self.resume is None else "resume")
        if len(set(self.metric)) < len(self.metric):
            raise ValueError(f"metric {' '.join(self.metric)} names one of them twice")
        gpus = self.gpus_per_trial or 0
        if gpus > self.workers:
            raise ValueError(
                f"gpus_per_trial {gpus:g} is more than one for each worker, which computes on one "
                f"GPU: take {self.workers} or less, or more --workers"
            )
        if self.scheduler == "pbt" and self.workers > 1:
            raise ValueError(
                f"scheduler 'pbt' is not available with workers {self.workers}: a trial copies "
                "another trial's weights within its own process, and a TorchTrainer's workers are "
                "other processes: take --workers 1, or --scheduler asha"
            )
        if self.scheduler == "pbt" and len(self.metric) > 1:
            raise ValueError(
                "scheduler 'pbt' compares trials by one metric, and several are given: give one "
                "--metric"
            )
        if self.scheduler in ("asha", "median") and len(self.metric) > 1:
            raise ValueError(
                f"scheduler {self.scheduler!r} stops trials by one metric, and several are given: "
                "give one --metric, or --scheduler none"
            )
        if self.scheduler == "pbt" and self.trials < 2:
            raise ValueError(
                f"scheduler 'pbt' copies weights between trials, and trials {self.trials} is one "
                "alone: take --trials 2 or more"
            )
        return self

    def __getstate__(self) -> dict[Any, Any]:
        """Return what is pickled, which Ray Tune may store: without the study's secret."""
        state = super().__getstate__()
        study = public_uri(self.study or "") or None
        return {**state, "__dict__": {**state["__dict__"], "study": study}}

    @property
    def resolved_scheduler(self) -> str:
        """The scheduler, with `auto` resolved."""
        if self.scheduler != "auto":
            return self.scheduler
        return "asha" if len(self.metric) < 2 else "none"
