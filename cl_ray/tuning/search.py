"""A search before Ray starts: made of flags or read back, and checked."""

import os
import re
import secrets
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

import yaml

from cl_ray.base_config import FORMAT_VERSION, check_format_version, marked_fields
from cl_ray.cli import add_data_defaults, default_preset, flag_value, name_flag, parse_flags
from cl_ray.config import Config, build_config, differences, merge, preset
from cl_ray.errors import UserError
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.storage import RunStorage
from cl_ray.tuning.options import SearchOptions
from cl_ray.tuning.space import Space, Values, apply_values, unflatten
from cl_ray.uri import public_uri

if TYPE_CHECKING:  # `--help` must not wait for torch and pyarrow
    from cl_ray.data.dataset import Dataset
    from cl_ray.tuning.study import SearchMetric

SEARCH_FILE = "search.yaml"
"""File of a search's folder with its options, space and config."""

_LAUNCH_OPTIONS = {"address", "dashboard", "verbose"}
"""Where a search is run and what it shows: not stored, as a resumed one has its own."""

_ECONOMICAL_EVALUATION = {"samples": 2000, "images": 2000}
"""How trials are evaluated unless the config says otherwise, so that a search takes minutes."""


@dataclass(frozen=True)
class Search:
    """A search that is ready to run.

    Args:
        options: The flags; of a resumed search, those that it was started with.
        config: The config that best.yaml changes.
        trial_config: The config that trials change: the same with their epochs and evaluation.
    """

    name: str
    folder: RunStorage
    options: SearchOptions
    space: Space
    config: Config
    trial_config: Config
    dataset: "Dataset"
    metrics: "list[SearchMetric]"
    fresh: bool

    @property
    def trials_folder(self) -> RunStorage:
        """The folder of the trials' run folders."""
        return self.folder.subfolder("trials")

    def save(self) -> None:
        """Write search.yaml, without what may be secret in the study's URL."""
        study = self.options.study and public_uri(self.options.study)
        record = {
            "format_version": FORMAT_VERSION,
            "options": {
                **self.options.model_dump(mode="json", exclude=_LAUNCH_OPTIONS),
                "study": study,
            },
            "study_has_credentials": study != self.options.study,
            "space": self.space.to_dict(),
            "config": self.config.model_dump(mode="json"),
            "data": self.dataset.info.fingerprint,
        }
        self.folder.write(SEARCH_FILE, yaml.safe_dump(record, sort_keys=False).encode())

    def resume_command(self, prog: str) -> str:
        """Return the command that resumes the search, without credentials."""
        storage = shlex.quote(self.folder.storage)
        study = self.options.study or ""
        flag = " --study URL" if public_uri(study) != study else ""
        if self.options.address:
            flag += f" --address {shlex.quote(self.options.address)}"
        return f"{prog} --resume {shlex.quote(self.name)} --storage {storage}{flag}"


def prepare_search(arguments: Sequence[str], prog: str) -> Search:
    """Return the search that the flags ask for, new or resumed, with everything checked.

    Raises:
        UserError: One sentence on what is wrong and how to fix it.
    """
    name, storage = name_flag(arguments, "resume"), flag_value(arguments, "storage")
    if name is None or storage == "":  # the latter is refused with the other flags
        return _new_search(_with_absolute_paths(parse_flags(SearchOptions, arguments, prog=prog)))
    folder = RunStorage.at(storage or SearchOptions().storage, name)
    record = _load_record(folder)
    before = _with_absolute_paths(SearchOptions.model_validate(record["options"]))
    # Flags that are left out: as before, but for those that are compared as a whole.
    default = before.model_copy(update={"metric": (), "set": (), "space": "", "config": None})
    options = parse_flags(SearchOptions, arguments, prog=prog, default=default)
    return _resumed_search(_with_absolute_paths(options), before, record, folder)


def _new_search(options: SearchOptions) -> Search:
    name = options.name or f"search-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    folder = RunStorage.at(options.storage, name)
    if _read_record(folder) is not None:
        raise UserError(
            f"The search {name} exists already: --resume {name} resumes it, another --name starts "
            "a new one."
        )
    config, space = _config_from_flags(options), Space.load(options.space)
    return _check_search(folder, options, space, config, fresh=True)


def _resumed_search(
    options: SearchOptions, before: SearchOptions, record: dict[str, Any], folder: RunStorage
) -> Search:
    """Return a search to resume, if the flags agree with it."""
    if record["study_has_credentials"] and options.study == before.study:
        raise UserError(
            f"study {before.study!r} was given with a user, a password or an option that is not "
            "stored: give --study with it again."
        )
    study = options.study
    if study and public_uri(study) == before.study:
        options = options.model_copy(update={"study": before.study})
    changeable = set(marked_fields(SearchOptions, "changeable_on_resume"))
    if before.scheduler == "pbt":
        changeable.remove("trials")  # a population is trained at once
    changes = {
        field: (getattr(before, field), getattr(options, field))
        for field in SearchOptions.model_fields
        if field not in changeable and getattr(options, field) not in ((), getattr(before, field))
    }
    space = Space.from_yaml(yaml.safe_dump(record["space"]), f"{folder}/{SEARCH_FILE}")
    config = build_config(record["config"], f"{folder}/{SEARCH_FILE}")
    if options.space:
        ours, theirs = space.to_dict(), Space.load(options.space).to_dict()
        pairs = {field: (ours.get(field), theirs.get(field)) for field in {**ours, **theirs}}
        changes |= {field: pair for field, pair in pairs.items() if pair[0] != pair[1]}
    if options.config or options.set:
        asked = options.model_copy(update={"preset": before.preset, "data": before.data})
        changes |= differences(config, _config_from_flags(asked))
    if changes:
        shown = "; ".join(
            f"{field} was {_format(old)}, now {_format(new)}"
            for field, (old, new) in changes.items()
        )
        raise UserError(
            f"The search {folder} was started with other settings: {shown}. Leave that out to "
            "resume it, or start another with --name."
        )
    kept = {field: getattr(before, field) for field in ("metric", "set", "space", "config")}
    options = options.model_copy(update={**kept, "study": study})
    search = _check_search(folder, options, space, config, fresh=False)
    search.dataset.check_same(record.get("data"))
    return search


def _check_search(
    folder: RunStorage, options: SearchOptions, space: Space, config: Config, fresh: bool
) -> Search:
    """Check that everything goes together, and return the search."""
    from cl_ray.console import PlainConsole
    from cl_ray.data.dataset import Dataset
    from cl_ray.evaluation.metrics import (
        MetricContext,
        available_metrics,
        check_metric_available,
        is_larger_better,
    )
    from cl_ray.evaluation.reference_cache import prepare_reference
    from cl_ray.evaluation.reference_name import expected_reference, resolve_reference
    from cl_ray.training import preflight
    from cl_ray.tuning.study import SearchMetric

    if config.from_run:
        raise UserError(
            f"from_run {config.from_run!r} is not for a search, whose trials begin with random "
            "weights: leave it out."
        )
    preflight.check_outlives_job(options.storage, "storage")
    preflight.check_outlives_job(folder.storage, "storage")
    place = {"name": folder.name, "storage": folder.storage, "resume": None}
    options = options.model_copy(update=place)
    config = preflight.resolve_reference_path(config)
    dataset = all_images = Dataset.open(config.data)
    if options.images:
        dataset = subset_dataset(dataset, options.images)
    trial_config = _trial_config(config, options, dataset.location)
    space.check(trial_config, options.space)
    if fresh:
        for point in space.initial_points(trial_config):
            apply_values(trial_config, point)
    if preflight.starts_local_ray(options.address):
        preflight.check_local_capacity(options.cpus_per_trial, options.gpus_per_trial, "trial")
        one = {"workers": 1, "cpus_per_worker": None, "gpus_per_worker": None}
        preflight.check_local_resources(trial_config.model_copy(update=one))
    preflight.check_pairs(trial_config, dataset)
    preflight.check_reference(trial_config, dataset)

    def check_metrics(reference: str | None) -> tuple[Config, MetricContext]:
        """Check the metrics if `auto` is that reference; return the trials' config with it."""
        best = preflight.replace_auto_reference(config, reference)
        preflight.check_checkpoint_metric(best, all_images)  # best.yaml has that metric
        trial = preflight.replace_auto_reference(trial_config, reference)
        context = MetricContext.of(dataset, trial.evaluation, trial.condition)
        for name in options.metric:
            check_metric_available(name, context, "metric")
        return trial, context

    if trial_config.evaluation.reference == "auto":
        check_metrics(expected_reference(all_images))
        prepare_reference(all_images, PlainConsole())
    trial_config, context = check_metrics(resolve_reference(all_images, "auto"))
    names = options.metric or available_metrics(context)[:1]
    metrics = [SearchMetric(name, is_larger_better(name)) for name in names]
    folder.create()
    return Search(
        folder.name, folder, options, space, config, trial_config, dataset, metrics, fresh
    )


def _trial_config(config: Config, options: SearchOptions, data: str) -> Config:
    """Return the config that trials change."""
    # A trial without an evaluation after an epoch has collapsed.
    changes: dict[str, Any] = {
        "epochs": options.epochs,
        "checkpoint": {"keep": 2},  # a damaged one is not the only one
        "evaluation": {"every": 1},
        "data": data,
        "workers": options.workers,
    }
    given = config.evaluation.model_dump(include={"reference", "every"})
    if config.evaluation == EvaluationConfig(**given):
        set_by_flag = _parse_assignments(options.set)
        changes["evaluation"] |= {
            name: value
            for name, value in _ECONOMICAL_EVALUATION.items()
            if f"evaluation.{name}" not in set_by_flag
        }
    return build_config(merge(config.model_dump(), changes), "the trials' config")


def _config_from_flags(options: SearchOptions) -> Config:
    """Return the data's defaults with the fields of the file, then those of the flags."""
    from cl_ray.data.dataset import absolute_dataset_location, read_info

    given = _parse_assignments(options.set)
    if options.data:
        given["data"] = options.data
    of_file = Config.load(options.config, Config()) if options.config else Config()
    info = read_info(str(given.get("data", of_file.data)))
    config = preset(
        options.preset or default_preset(info.shape[0] if info else None, options.config)
    )
    if options.config:
        config = Config.load(options.config, config)
    if info and "train" in info.splits:
        images = info.splits["train"].rows
        config = add_data_defaults(
            config, options.config, images, info.photographic, batch_size=None
        )
    fields = merge(config.model_dump(), {**unflatten(given), "name": None})
    config = build_config(fields, "the flags")
    return config.model_copy(update={"data": absolute_dataset_location(config.data)})


def _with_absolute_paths(options: SearchOptions) -> SearchOptions:
    """Return the options with what names local files as it is found from any folder."""
    from cl_ray.data.dataset import absolute_dataset_location

    changes = {"data": absolute_dataset_location(options.data)} if options.data else {}
    relative = re.fullmatch(r"(sqlite:///)([^/:?][^?]*)(.*)", options.study or "")
    if relative:
        changes["study"] = f"{relative[1]}{os.path.abspath(relative[2])}{relative[3]}"
    return options.model_copy(update=changes)


def _parse_assignments(pairs: Sequence[str]) -> Values:
    """Return the fields that `--set` gives, each as `seed=1`."""
    given: Values = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"set {pair!r} is not a field and its value, as `seed=1`.")
        try:
            given[field.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # the latter: an impossible date
            reason = getattr(error, "problem", None) or error
            raise UserError(
                f"set {pair!r} gives a value that is not YAML ({reason}): quote it or correct it."
            ) from error
    for field in given:
        part = next((other for other in given if other.startswith(f"{field}.")), None)
        if part:
            raise UserError(f"set {field} and set {part} are of the same field: leave one out.")
    return given


def subset_dataset(dataset: "Dataset", images: int) -> "Dataset":
    """Return the data set with the first training images only, in whole row groups.

    The pairwise distances remain those of all images.
    """
    from cl_ray.data.dataset import SplitInfo
    from cl_ray.data.partition import TRAIN_SPLIT

    train = dataset.info.splits[TRAIN_SPLIT]
    row_groups = -(-images // dataset.info.row_group)
    shards, rows = [], 0
    for shard in train.shards:
        left = row_groups * dataset.info.row_group - rows
        if left > 0:
            shards.append(shard.model_copy(update={"rows": min(shard.rows, left)}))
            rows += shards[-1].rows

    def with_split(unlabelled: int) -> "Dataset":
        cut = SplitInfo(rows=rows, shards=shards, distances=train.distances, unlabelled=unlabelled)
        splits = {**dataset.info.splits, TRAIN_SPLIT: cut}
        return replace(dataset, info=dataset.info.model_copy(update={"splits": splits}))

    subset = with_split(0)
    if not train.unlabelled:
        return subset
    return with_split(rows - sum(subset.class_counts(TRAIN_SPLIT)))


def _load_record(folder: RunStorage) -> dict[str, Any]:
    text = _read_record(folder)
    if text is None:
        raise UserError(
            f"There is no search {folder}: start it with --name {folder.name}, or say where it is "
            "with --storage."
        )
    try:
        record = yaml.safe_load(text)
    except yaml.YAMLError:
        record = None
    record = record if isinstance(record, dict) else {}
    if "format_version" in record or "options" in record:
        check_format_version(record.get("format_version", 1), f"The search {folder}")
    needed = ("options", "study_has_credentials", "space", "config")
    missing = [key for key in needed if key not in record]
    if missing:
        raise UserError(
            f"{folder}/{SEARCH_FILE} is not the record of a search (it has no {missing[0]!r}): put "
            "back the search's own, or take another --name."
        )
    return dict(record)


def _read_record(folder: RunStorage) -> bytes | None:
    try:
        return folder.read(SEARCH_FILE)
    except OSError as error:
        raise UserError(f"storage {folder.storage!r} cannot be read: {error}.") from error


def _format(value: Any) -> str:
    if isinstance(value, dict):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()
    return "not searched" if value is None else str(value)
