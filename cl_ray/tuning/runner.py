"""Run the trials of a search with Ray Tune, each in a process that the next one takes over."""

import math
import random
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import optuna
import pyarrow.fs
from ray import tune
from ray.tune.schedulers import (
    AsyncHyperBandScheduler,
    FIFOScheduler,
    MedianStoppingRule,
    PopulationBasedTraining,
    TrialScheduler,
)
from ray.tune.search import Searcher

from cl_ray.data.dataset import RowBatch
from cl_ray.data.partition import Partition
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.storage import RunStorage
from cl_ray.training.ray_compat import (
    HEAD_RESOURCE,
    ascii_name,
    pending_trials,
    replace_pbt_explore,
    withhold_credentials,
)
from cl_ray.training.resources import (
    InsufficientResourcesError,
    WorkerResources,
    describe_resources,
    find_autoscaler,
    live_nodes,
    max_capacity,
    plan_workers,
    workers_per_node,
)
from cl_ray.tuning.callbacks import (
    InterruptCallback,
    OrphanedPlacementGroups,
    StudyCallback,
    trial_number,
)
from cl_ray.tuning.search import Search
from cl_ray.tuning.study import (
    TrialResult,
    ask_point,
    missing_trials,
    startup_trials,
    trial_results,
    unfinished_trials,
)
from cl_ray.tuning.trial import DistributedTrial, LocalTrial, TrialContext

_MAX_ATTEMPTS = 2
"""Times that a trial is tried before it counts as failed."""
_REDUCTION_FACTOR = 3
"""Of the trials that reach a rung of ASHA, the best third goes on. Li et al. (2020), section 3,
take 4."""


@dataclass(frozen=True)
class TrialResources:
    """How the cluster is divided among the trials: so many at once, of so many workers each.

    Args:
        may_grow: Whether an autoscaler may add resources for more trials, and does not say for how
            many.
    """

    concurrent: int
    workers: int
    each: WorkerResources
    may_grow: bool = False

    def __str__(self) -> str:
        trials = "trials at once" if self.concurrent > 1 else "trial at a time"
        workers = f"of {self.workers} workers, " if self.workers > 1 else ""
        hint = "; --concurrent asks the autoscaler for more" if self.may_grow else ""
        each = describe_resources(self.each.cpus, self.each.gpus)
        return f"{self.concurrent} {trials}, {workers}{each} each{hint}"


def allocate_trials(search: Search, local: bool, trials: int | None = None) -> TrialResources:
    """Return how many trials run at once, from what the cluster has and its autoscaler may add.

    A local cluster's CPUs and GPUs are divided among all trials; `trials` is how many are left to
    run, None for all.

    Raises:
        InsufficientResourcesError: So many can never run at once, or not even one.
        UserError: A number is given for a population, whose size Tune takes for it.
    """
    trials = search.options.trials if trials is None else trials
    workers, concurrent, may_grow = search.options.workers, search.options.concurrent, False
    given = search.options.cpus_per_trial or search.options.gpus_per_trial
    if search.options.scheduler == "pbt" and concurrent and (given or not local):
        raise UserError(
            f"concurrent {concurrent} does not bound a population, of which as many train at once "
            "as fit: leave it out, and give --cpus-per-trial and --gpus-per-trial."
        )
    if concurrent is None:
        gpus = _plan_trials(search, 1, local).gpus
        cpus = _per_worker(search.options.cpus_per_trial, workers) or 1.0
        on_node = partial(workers_per_node, cpus=cpus, gpus=gpus)
        fits = max_capacity(on_node, live_nodes(), None if local else find_autoscaler())
        unknown = math.isinf(fits)
        fits = sum(map(on_node, live_nodes())) if unknown else fits
        useful = trials
        if search.options.sampler in ("tpe", "nsga2") and search.options.scheduler != "pbt":
            # Of trials that all start at once, the sampler would learn nothing.
            useful = min(trials, max(startup_trials(search.options.trials), -(-trials // 2)))
        concurrent = max(1, min(int(fits) // workers, useful))
        may_grow = unknown and concurrent < useful
    return TrialResources(concurrent, workers, _plan_trials(search, concurrent, local), may_grow)


def _plan_trials(search: Search, concurrent: int, local: bool) -> WorkerResources:
    """Return what each worker asks for, with so many trials at once."""
    options = search.options
    request = {
        "workers": concurrent * options.workers,
        "cpus_per_worker": _per_worker(options.cpus_per_trial, options.workers),
        "gpus_per_worker": _per_worker(options.gpus_per_trial, options.workers),
        "threads": None,
        # A trial is evaluated between its epochs: no CPU is left to evaluations beside training.
        "evaluation": search.trial_config.evaluation.model_copy(update={"every": 0}),
    }
    try:
        return plan_workers(search.trial_config.model_copy(update=request), local)
    except InsufficientResourcesError as error:
        fits, smaller = error.shortage.fits, None
        if fits >= options.workers:
            smaller = f"--concurrent {fits // options.workers}"
        elif fits and not (options.cpus_per_trial or options.gpus_per_trial):
            # With either, fewer workers would divide as much among them.
            one = "--concurrent 1 with " if concurrent > 1 else ""
            smaller = f"{one}--workers {error.shortage.usable_workers}"
        of = f" {options.workers} workers of" if options.workers > 1 else ""
        raise InsufficientResourcesError(
            error.shortage, f"concurrent {concurrent} with{of}", smaller, unit="trial"
        ) from error


def _per_worker(per_trial: float | None, workers: int) -> float | None:
    """Return a worker's part of a trial's CPUs or GPUs, rounded down to Ray's precision."""
    return None if per_trial is None else math.floor(1e4 * per_trial / workers + 1e-6) / 1e4


class StudySearch(Searcher):
    """Has Ray Tune run the study's unfinished trials, then what its sampler proposes.

    `ray.tune.search.optuna.OptunaSearch` cannot resume a study's unfinished trials. The study
    hears of results from `StudyCallback`, which is called before a driver may be killed.
    """

    def __init__(self, study: optuna.Study, search: Search, unfinished: list[int]):
        super().__init__()
        self.study, self._unfinished = study, list(unfinished)
        self._suggest = partial(search.space.suggest, base=search.trial_config)

    def __getstate__(self) -> dict[str, Any]:
        """Return what Ray Tune stores: without the study, whose URL may hold a password."""
        return {**self.__dict__, "study": None}

    def suggest(self, trial_id: str) -> dict[str, Any]:
        """Return a trial's number and values; Ray Tune asks once a trial."""
        number = self._unfinished.pop(0) if self._unfinished else None
        return {"point": ask_point(self.study, self._suggest, number)}

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """Do nothing: `StudyCallback` records it."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: everything is in the study."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: everything is in the study."""


class ResumedASHA(AsyncHyperBandScheduler):
    """ASHA that knows the epochs which trials reported before the search was resumed.

    Otherwise a resumed trial's next result would be compared with others after one epoch.

    Args:
        metric: Name of the metric.
        earlier: The search's trials; those that have ended are compared with new ones.
        options: As of AsyncHyperBandScheduler.
    """

    def __init__(self, metric: str, earlier: list[TrialResult], **options: Any):
        super().__init__(metric=metric, **options)
        self._earlier = {result.number: result.history for result in earlier}
        for result in earlier:
            if result.has_ended:
                config = {"point": {"number": result.number}}
                self.on_trial_add(
                    None, SimpleNamespace(trial_id=f"earlier-{result.number}", config=config)
                )

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        """Add a trial with the results that it reported earlier."""
        super().on_trial_add(tune_controller, trial)
        for epoch, value in sorted(self._earlier.get(trial_number(trial), {}).items()):
            self.on_trial_result(tune_controller, trial, {"epoch": epoch, self.metric: value})


def build_scheduler(search: Search, earlier: list[TrialResult]) -> TrialScheduler:
    """Build the scheduler that stops trials early, or changes them on the way.

    ASHA compares the trials with what those of a resumed search reported, `earlier`.

    Population-based training is that of Jaderberg et al. (2017): a trial of the worst quarter
    copies a trial of the best quarter, which is its networks, EMA generator, optimizers, position
    and architecture. Its rates and weights are perturbed; its number stays.
    """
    kind, metric = search.options.resolved_scheduler, search.metrics[0]
    by: dict[str, Any] = {"time_attr": "epoch", "metric": metric.name, "mode": metric.mode}
    if kind == "asha":
        epochs = max(search.options.epochs, 2)
        return ResumedASHA(**by, earlier=earlier, max_t=epochs, reduction_factor=_REDUCTION_FACTOR)
    if kind == "median":
        return MedianStoppingRule(**by, grace_period=1)
    if kind == "none":
        return FIFOScheduler()
    seed = search.options.seed + sum(result.epoch for result in earlier)  # another when resumed
    rng = random.Random(seed)

    def explore(config: dict[str, Any], donor: dict[str, Any]) -> dict[str, Any]:
        values = search.space.perturb(donor["point"]["values"], search.trial_config, rng)
        return {"point": {"number": config["point"]["number"], "values": values}}

    scheduler = PopulationBasedTraining(
        **by,
        perturbation_interval=1,
        quantile_fraction=0.25,
        custom_explore_fn=dict,
        log_config=False,
    )
    replace_pbt_explore(scheduler, explore)
    return scheduler


def run_trials(
    search: Search,
    study: optuna.Study,
    resources: TrialResources,
    recorder: StudyCallback,
    interrupt: InterruptCallback,
) -> None:
    """Run trials until so many have ended as the search has: unfinished, enqueued, new ones.

    Raises:
        Interrupted: Ctrl-C was pressed.
    """
    results = trial_results(study, search.options.trials)
    count = missing_trials(results, search.options.trials)
    unfinished = unfinished_trials(study)[:count]
    pbt = search.options.scheduler == "pbt"
    searcher: dict[str, Any] = {}
    param_space: dict[str, Any] = {}
    if pbt:  # Tune allows it no searcher: the population is drawn at once
        suggest = partial(search.space.suggest, base=search.trial_config)
        numbers = [*unfinished, *[None] * (count - len(unfinished))]
        points = [ask_point(study, suggest, number) for number in numbers]
        param_space = {"point": tune.grid_search(points)}
    else:
        searcher = {"search_alg": StudySearch(study, search, unfinished), "num_samples": count}
    callbacks = [recorder, interrupt]
    if resources.workers > 1:
        callbacks.append(OrphanedPlacementGroups())
    name = ascii_name(search.name)
    withhold_credentials()
    tuner = tune.Tuner(
        _build_trainable(search, resources),
        param_space=param_space,
        tune_config=tune.TuneConfig(
            **searcher,
            scheduler=build_scheduler(search, results),
            # Tune counts the paused trials of a population as running ones. How many train at once
            # follows from what each asks for.
            max_concurrent_trials=None if pbt else resources.concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"{name}-{trial_number(trial):04d}",
            trial_dirname_creator=lambda trial: f"{trial_number(trial):04d}",
        ),
        run_config=tune.RunConfig(
            name=f"tune-{uuid4().hex[:8]}",
            storage_path=search.folder.uri,
            failure_config=tune.FailureConfig(max_failures=_MAX_ATTEMPTS - 1),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False, num_to_keep=4 if pbt else None
            ),
            callbacks=callbacks,
            verbose=0,
        ),
    )
    _delete_tune_files(search.folder)
    try:
        # A population's trials wait for each other: machines for all of it would stand idle.
        with interrupt.catch_sigint(), pending_trials(1 if pbt else resources.concurrent):
            tuner.fit()
    finally:
        _delete_tune_files(search.folder)


def _build_trainable(search: Search, resources: TrialResources) -> type:
    """Return the trials' class, with its resources and what trials share in the object store.

    The process of a trial of several workers computes nothing itself: it runs on the head, which
    does not leave the cluster, and its workers ask for their own resources.

    The class is named after the search, which the dashboard's actors and the operating system's
    processes show; `tune.with_parameters` and `tune.with_resources` would name it themselves.
    """
    context = TrialContext(
        search=search.name,
        folder=search.trials_folder,
        space=search.space,
        base=search.trial_config,
        dataset=search.dataset,
        metrics=search.metrics,
        resources=resources.each,
        exploits=search.options.scheduler == "pbt",
    )
    if resources.workers > 1:
        trainable = tune.with_parameters(DistributedTrial, context=context)
        request = {HEAD_RESOURCE: 0.001}
    else:
        config = search.trial_config
        evaluator = Evaluator(search.dataset, config.evaluation, seed=config.seed)
        evaluator.images()
        trainable = tune.with_parameters(
            LocalTrial, context=context, rows=read_shared_rows(search), evaluator=evaluator
        )
        request = resources.each.bundle
    bundles = tune.PlacementGroupFactory([request])
    attributes = {"default_resource_request": classmethod(lambda cls, config: bundles)}
    return type(f"Trial_{ascii_name(search.name)}", (trainable,), attributes)


def read_shared_rows(search: Search) -> RowBatch | None:
    """Read the training images that all trials of one worker share; None if they are streamed."""
    partition = Partition(search.dataset, search.trial_config)
    return partition.read(partition.row_ranges(0)) if partition.resident else None


def _delete_tune_files(folder: RunStorage) -> None:
    """Delete what Ray Tune itself wrote of this search, also of a driver that was killed."""
    filesystem, path = folder.open()
    for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path)):
        if info.base_name.startswith("tune-"):
            filesystem.delete_dir(info.path)
