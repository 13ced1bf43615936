"""All that can be wrong with a search, found before anything is started."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

import yaml

from cl_ray.cli import parse
from cl_ray.commands.train import default_preset, flag, plain_name
from cl_ray.config import Config, build, differences, merge, preset
from cl_ray.data.dataset import Dataset, SplitInfo
from cl_ray.data.partition import TRAIN_SPLIT
from cl_ray.errors import UserError, redact_credentials
from cl_ray.evaluation.available_metrics import available_metrics, check_metric_available
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import is_larger_better
from cl_ray.storage import RunStorage
from cl_ray.training.launch import check_checkpoint_metric, check_pairs, check_reference
from cl_ray.training.preflight import check_local_resources, check_machine_has, starts_local_ray
from cl_ray.tuning.options import MAY_CHANGE, Options
from cl_ray.tuning.space import DEFAULT, Space, Values, configured, nested
from cl_ray.tuning.study import SearchMetric

VERSION = 1
"""Of search.yaml and of what the study says of a trial."""
RECORD = "search.yaml"
ECONOMY = {"evaluation": {"samples": 2000, "images": 2000}}
"""How trials are measured unless the config says otherwise: twelve are to end in minutes."""


@dataclass(frozen=True)
class Search:
    """A search that may start.

    Args:
        name: Its name.
        folder: Where it is kept.
        options: The flags, or those it was begun with.
        space: What is searched.
        config: What `cl-ray train` is to start from.
        base: That config as the trials have it.
        dataset: What they train on.
        metrics: What is optimised.
        fresh: Whether it is new.
    """

    name: str
    folder: RunStorage
    options: Options
    space: Space
    config: Config
    base: Config
    dataset: Dataset
    metrics: list[SearchMetric]
    fresh: bool

    @property
    def trials(self) -> RunStorage:
        """Where the trials' run folders lie."""
        return RunStorage(self.folder.uri, "trials")

    @property
    def wanted(self) -> int:
        """How many trials there are to be in all."""
        pbt = self.options.scheduler == "pbt"
        return self.options.population if pbt else self.options.trials

    def record(self) -> bytes:
        """What search.yaml says: all but the user and password of the study's URL."""
        study = self.options.study and redact_credentials(self.options.study)
        plain = {
            "version": VERSION,
            "options": {**self.options.model_dump(mode="json"), "study": study},
            "keys": study != self.options.study,
            "space": self.space.to_dict(),
            "config": self.config.model_dump(mode="json"),
        }
        return yaml.safe_dump(plain, sort_keys=False).encode()


def prepare_search(arguments: Sequence[str], prog: str) -> Search:
    """The search that the flags ask for.

    Raises:
        UserError: One sentence on what is wrong and the way out.
    """
    resume, storage = plain_name(arguments, "resume"), flag(arguments, "storage")
    if resume is None or storage == "":  # the latter is refused with the other flags
        return _begin(parse(Options, arguments, prog=prog))
    folder = RunStorage.at(storage or Options().storage, resume)
    saved = _saved(folder)
    before = Options.model_validate(saved["options"])
    blank = before.model_copy(update={"metric": (), "set": (), "space": None, "config": None})
    options = parse(Options, arguments, prog=prog, default=blank)
    return _go_on(options, before, saved, folder)


def _begin(options: Options) -> Search:
    name = options.name or f"search-{datetime.now():%Y%m%d-%H%M%S}"
    folder = RunStorage.at(options.storage, name)
    if _read(folder) is not None:
        raise UserError(
            f"The search {name} is there already: --resume {name} goes on with it, another --name "
            "begins anew."
        )
    config = _config(options)
    space = Space.load(options.space) if options.space else Space.from_yaml(DEFAULT)
    options = options.model_copy(
        update={"name": name, "storage": redact_credentials(folder.storage)}
    )
    return _search(folder, options, space, config, fresh=True)


def _go_on(options: Options, before: Options, saved: dict[str, Any], folder: RunStorage) -> Search:
    """A search that was begun, as far as the flags agree with it."""
    if saved.get("keys") and options.study == before.study:
        raise UserError(
            f"study {before.study!r} was given with a user and password, which are not kept: give "
            "--study with them again."
        )
    url = options.study
    if url and redact_credentials(url) == before.study:
        options = options.model_copy(update={"study": before.study})
    changes = {
        field: (getattr(before, field), getattr(options, field))
        for field in Options.model_fields
        if field not in MAY_CHANGE and getattr(options, field) not in ((), getattr(before, field))
    }
    space = Space.from_yaml(yaml.safe_dump(saved["space"]), f"{folder}/{RECORD}")
    config = build(saved["config"], f"{folder}/{RECORD}")
    if options.space:
        new = Space.load(options.space)
        for field in {**space.to_dict(), **new.to_dict()}:
            pair = space.to_dict().get(field), new.to_dict().get(field)
            if pair[0] != pair[1]:
                changes[field] = pair
    if options.config or options.set:
        asked = options.model_copy(update={"preset": before.preset, "data": before.data})
        changes |= differences(config, _config(asked))
    if changes:
        shown = "; ".join(
            f"{k} was {_shown(old)}, now {_shown(new)}" for k, (old, new) in changes.items()
        )
        raise UserError(
            f"The search {folder} was begun otherwise: {shown}. Leave that out to go on with it, "
            "or begin another with --name."
        )
    kept = {f: getattr(before, f) for f in ("metric", "set", "space", "config", "name")}
    kept |= {"storage": redact_credentials(folder.storage), "study": url}
    options = options.model_copy(update={**kept, "resume": None})
    return _search(folder, options, space, config, fresh=False)


def _search(
    folder: RunStorage, options: Options, space: Space, config: Config, fresh: bool
) -> Search:
    """See that everything goes together."""
    dataset = Dataset.open(config.data)
    if options.images:
        dataset = subset(dataset, options.images)
    trials: dict[str, Any] = {
        "epochs": options.epochs,
        "checkpoint": {"keep": 1},
        "evaluation": {"every": 1},  # a trial without a figure after an epoch has collapsed
    }
    told = config.evaluation.model_dump(include={"reference", "every"})
    if config.evaluation == EvaluationConfig(**told):
        trials = merge(trials, ECONOMY)
    trials["data"] = dataset.location
    base = build(merge(config.model_dump(), trials), "the trials' config")
    base = base.model_copy(update={"workers": options.workers})
    space.check(base, options.space or "the space")
    if fresh:
        for point in space.known(base):
            configured(base, point)
    if starts_local_ray(options.address):
        check_machine_has(options.cpus_per_trial, options.gpus_per_trial, "trial")
        one = {"workers": 1, "cpus_per_worker": None, "gpus_per_worker": None}
        check_local_resources(base.model_copy(update=one))
    check_pairs(base, dataset)
    check_reference(base, dataset)
    check_checkpoint_metric(config, dataset)  # best.yaml is that one
    metrics = metrics_of(options.metric, dataset, base)
    folder.prepare()
    return Search(folder.name, folder, options, space, config, base, dataset, metrics, fresh)


def _config(options: Options) -> Config:
    """The preset, then the file's fields, then the flags'."""
    config = preset(options.preset or default_preset())
    if options.config:
        config = Config.load(options.config, config)
    given = _set(options.set)
    if options.data:
        given["data"] = options.data
    fields = merge(config.model_dump(), {**nested(given), "name": None})
    return build(fields, "the flags")


def _set(pairs: Sequence[str]) -> Values:
    """What `--set` says of fields, each as `seed=1`."""
    given: Values = {}
    for pair in pairs:
        field, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"set {pair!r} is not a field and its value, as `seed=1`.")
        try:
            given[field.strip()] = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError) as error:  # the latter of a date that is none
            why = getattr(error, "problem", None) or error
            raise UserError(
                f"set {pair!r} gives a value that is not YAML ({why}): quote it or mend it."
            ) from error
    for field in given:
        part = next((other for other in given if other.startswith(f"{field}.")), None)
        if part:
            raise UserError(f"set {field} and set {part} are of the same field: leave one out.")
    return given


def metrics_of(names: Sequence[str], dataset: Dataset, base: Config) -> list[SearchMetric]:
    """What is optimised.

    Raises:
        UserError: The evaluation of such data does not give it.
    """
    for name in names:
        check_metric_available(name, base, dataset, "metric")
    chosen = names or available_metrics(base, dataset)[:1]
    return [SearchMetric(name, is_larger_better(name)) for name in chosen]


def subset(dataset: Dataset, images: int) -> Dataset:
    """The first training images, in whole row groups; the distances of all of them still hold."""
    info = dataset.info.splits[TRAIN_SPLIT]
    groups = -(-images // dataset.info.row_group)
    shards, rows = [], 0
    for shard in info.shards:
        left = groups * dataset.info.row_group - rows
        if left > 0:
            shards.append(shard.model_copy(update={"rows": min(shard.rows, left)}))
            rows += shards[-1].rows
    cut = SplitInfo(rows=rows, shards=shards, distances=info.distances)
    splits = {**dataset.info.splits, TRAIN_SPLIT: cut}
    return replace(dataset, info=dataset.info.model_copy(update={"splits": splits}))


def lacking() -> str | None:
    """A sentence on the package that report.html needs, if it is not there."""
    if importlib.util.find_spec("plotly") is None:
        return "report.html needs plotly, which is not there: pip install plotly."
    return None


def _saved(folder: RunStorage) -> dict[str, Any]:
    text = _read(folder)
    if text is None:
        raise UserError(
            f"There is no search {folder}: begin it with --name {folder.name}, or say where it "
            "is with --storage."
        )
    saved = yaml.safe_load(text)
    version = saved.get("version") if isinstance(saved, dict) else None
    if version != VERSION:
        raise UserError(
            f"The search {folder} was written by another version of cl_ray (its {RECORD} says "
            f"version {version}, this one reads {VERSION}): take another --name."
        )
    return dict(saved)


def _read(folder: RunStorage) -> bytes | None:
    try:
        return folder.read(RECORD)
    except OSError as error:
        raise UserError(
            f"storage {redact_credentials(folder.storage)!r} cannot be read: {error}."
        ) from error


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).strip()
    return "not searched" if value is None else str(value)
