"""What a search is given: the flags of `tuning/search.py`, which `search.yaml` keeps."""

from typing import Annotated, Literal

import tyro
from pydantic import Field, model_validator

from cl_ray.base_config import BaseConfig
from cl_ray.config import check_name

Several = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]
"""A flag that may be given more than once."""


class Options(BaseConfig):
    """Search for the balance between G and D: Optuna proposes, Ray Tune runs the trials."""

    name: str | None = Field(None, description="The search's name. None makes a fresh one.")
    resume: str | None = Field(
        None, description="Go on with the search of this name; a larger --trials adds to it."
    )
    storage: str = Field(
        "runs", min_length=1, description="Folder or URI under which the search's folder lies."
    )
    trials: int = Field(12, ge=1, le=100_000, description="Trials in all.")
    epochs: int = Field(3, ge=1, description="Passes of a trial that is not stopped early.")
    images: int | None = Field(
        4096,
        ge=100,
        description="Training images that trials see, rounded up to whole groups of rows; None is "
        "all of them.",
    )
    metric: Several = Field(
        (),
        description="What is optimised: a figure of the evaluation, such as frechet or "
        "linear_probe, or class_accuracy with a condition. Given twice or more, a Pareto front. "
        "None: frechet where it is measured.",
    )
    sampler: Literal["tpe", "random", "nsga2"] = Field(
        "tpe", description="Who proposes: tree-structured Parzen estimator, chance, or NSGA-II."
    )
    scheduler: Literal["auto", "asha", "median", "none", "pbt"] = Field(
        "auto",
        description="Who stops trials early: successive halving, the median rule or nobody; pbt "
        "is population-based training. auto: asha for one metric, none for several.",
    )
    population: int = Field(8, ge=2, description="Trials of population-based training.")
    concurrent: int | None = Field(
        None, ge=1, description="Trials at once; None is as many as the cluster has room for."
    )
    workers: int = Field(
        1, ge=1, description="Workers of a trial; with more than one, each is a TorchTrainer."
    )
    cpus_per_trial: float | None = Field(
        None,
        gt=0,
        description="CPUs of a trial, divided among its workers. None: a local machine's CPUs are "
        "shared out; on a cluster each worker has 1.",
    )
    gpus_per_trial: float | None = Field(
        None,
        ge=0,
        description="GPUs of a trial, divided among its workers, a fraction allowed: 0.25 puts "
        "four on one. None: a local machine's GPUs are shared out, at most one a worker; on a "
        "cluster none is used unless asked for.",
    )
    seed: int = Field(
        0, ge=0, lt=2**31, description="Of the proposals; trials train with config's."
    )
    preset: str | None = Field(None, description="Preset that the space changes.")
    config: str | None = Field(
        None, description="YAML file, or its URI, of the config that the space changes."
    )
    set: Several = Field(
        (), description="A field of that config, as `losses.temperature=0.1`; may be repeated."
    )
    space: str | None = Field(None, description="YAML file of what is searched (tuning/space.py).")
    data: str | None = Field(None, min_length=1, description="`mnist` or what `cl-ray data` wrote.")
    study: str | None = Field(
        None, description="Optuna storage URL, as sqlite:///s.db. None: study.log in the folder."
    )
    address: str | None = Field(None, description="Ray cluster to join; None starts Ray here.")
    dashboard: bool = Field(False, description="Start the Ray dashboard and print its address.")
    verbose: bool = Field(False, description="Show Ray's messages and the trials' output.")

    @model_validator(mode="after")
    def _fits_together(self) -> "Options":
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
        if gpus > self.workers and gpus % self.workers:
            each = f" for each of {self.workers} workers" if self.workers > 1 else ""
            raise ValueError(f"gpus_per_trial {gpus:g} must be a whole number or less than 1{each}")
        if self.scheduler == "pbt" and self.workers > 1:
            raise ValueError(
                f"scheduler 'pbt' with workers {self.workers} is refused: a trial takes over "
                "another's weights in its own process, and a TorchTrainer's workers are others: "
                "take --workers 1, or --scheduler asha"
            )
        if self.scheduler == "pbt" and len(self.metric) > 1:
            raise ValueError(
                "scheduler 'pbt' with several metrics is refused: it must say which trial is the "
                "better one: give one --metric"
            )
        return self

    @property
    def early(self) -> str:
        """The scheduler, `auto` resolved."""
        if self.scheduler != "auto":
            return self.scheduler
        return "asha" if len(self.metric) < 2 else "none"


MAY_CHANGE = {
    "name", "resume", "storage", "trials", "concurrent", "cpus_per_trial", "gpus_per_trial",
    "address", "dashboard", "verbose", "sampler", "seed", "space", "config", "set",
}  # fmt: skip
"""What a search that goes on may be given anew; space, config and set are compared as a whole."""
