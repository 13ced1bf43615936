"""Ray Tune runs the trials, each in a process that the next one takes over."""

import os
from typing import Any
from uuid import uuid4

import optuna
import pyarrow.fs
import ray
import ray.actor
from ray import tune

from cl_ray.config import Config
from cl_ray.data.partition import TRAIN_SPLIT, Partition
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.storage import RunStorage
from cl_ray.training.autoscaler import HEAD
from cl_ray.tuning.distributed_trial import DistributedTrial
from cl_ray.tuning.interrupt import InterruptCallback
from cl_ray.tuning.local_trial import LocalTrial
from cl_ray.tuning.orphaned_placement_groups import OrphanedPlacementGroups
from cl_ray.tuning.prepare import Search
from cl_ray.tuning.resources import TrialResources
from cl_ray.tuning.schedulers import build_scheduler
from cl_ray.tuning.searcher import StudySearch, point
from cl_ray.tuning.study import trial_results, unfinished_trials
from cl_ray.tuning.study_callback import StudyCallback, number_of
from cl_ray.tuning.trial import TrialContext

ATTEMPTS = 2
"""Times that a trial is tried before it counts as failed."""


def build_trial_context(
    search: Search, room: TrialResources, bell: "ray.actor.ActorHandle[Any]", signs: bool
) -> TrialContext:
    """What the trials have in common."""
    return TrialContext(
        search=search.name,
        folder=search.trials,
        base=search.base,
        dataset=search.dataset,
        metrics=search.metrics,
        plan=room.plan,
        replaced=search.options.scheduler == "pbt",
        bell=bell,
        signs=signs,
    )


def run_trials(
    search: Search,
    study: optuna.Study,
    room: TrialResources,
    recorder: StudyCallback,
    ctrl_c: InterruptCallback,
) -> None:
    """Bring the study to its number of trials, those first that were begun.

    Raises:
        Interrupted: Ctrl-C was pressed; what the trials did is saved.
    """
    begun = unfinished_trials(study)
    count = len(begun) + max(0, search.wanted - len(trial_results(study)))
    if not count:
        return
    options, job = search.options, recorder.job
    trainable, resources = trainable_of(search, job, room)
    before = [row for row in trial_results(study) if row.number not in begun]
    scheduler = build_scheduler(
        options.early, search.metrics[0], options.epochs, search.space, options.seed, before
    )
    searched: dict[str, Any] = {}
    space: dict[str, Any] = {}
    if options.early == "pbt":  # Ray refuses it a searcher: the population is drawn at once
        base: Config = search.base
        numbers: list[int | None] = [*begun, *[None] * (count - len(begun))]
        points = [point(study, lambda t: search.space.suggest(t, base), n) for n in numbers]
        space = {"point": tune.grid_search(points)}
    else:
        searched = {
            "search_alg": StudySearch(study, search.metrics, search.space, search.base, begun),
            "num_samples": count,
        }
    tuner = tune.Tuner(
        named(trainable, search.name, resources),
        param_space=space,
        tune_config=tune.TuneConfig(
            **searched,
            scheduler=scheduler,
            max_concurrent_trials=room.concurrent,
            reuse_actors=True,
            trial_name_creator=lambda trial: f"{search.name}-{number_of(trial):04d}",
            trial_dirname_creator=lambda trial: f"{number_of(trial):04d}",
        ),
        run_config=tune.RunConfig(
            name=f"tune-{uuid4().hex[:8]}",
            storage_path=search.folder.uri,
            failure_config=tune.FailureConfig(max_failures=ATTEMPTS - 1),
            checkpoint_config=tune.CheckpointConfig(
                checkpoint_at_end=False, num_to_keep=4 if options.early == "pbt" else None
            ),
            callbacks=[
                recorder,
                ctrl_c,
                *([OrphanedPlacementGroups()] if room.workers > 1 else []),
            ],
            verbose=0,
        ),
    )
    forget(search.folder)
    try:
        with ctrl_c.heeded():
            tuner.fit()
    finally:
        forget(search.folder)


def trainable_of(
    search: Search, job: TrialContext, room: TrialResources
) -> tuple[type, dict[str, float]]:
    """The trials' class, with what they share put into the object store once, and their resources.

    A trial of several workers computes nothing itself: its process lives beside the head, which
    no lost machine takes away, and its workers ask for their own.
    """
    if room.workers > 1:
        return tune.with_parameters(DistributedTrial, job=job), {HEAD: 0.001}
    share = Partition(search.dataset, search.base)
    evaluator = Evaluator(search.dataset, search.base.evaluation, search.base.seed)
    evaluator.images()
    rows = search.dataset.read(TRAIN_SPLIT, share.pieces(0)) if share.resident else None
    plan = room.plan
    return (
        tune.with_parameters(LocalTrial, job=job, rows=rows, evaluator=evaluator),
        {"CPU": plan.cpus, **({"GPU": plan.gpus} if plan.gpus else {})},
    )


def named(trainable: type, search: str, resources: dict[str, float]) -> type:
    """The trials' class under a name that the dashboard's actors and processes are found by.

    `tune.with_parameters` calls it _Inner, and `tune.with_resources` ResourceTrainable.
    """
    request = tune.PlacementGroupFactory([resources])
    own = {"default_resource_request": classmethod(lambda cls, config: request)}
    return type(f"Trial_{search}", (trainable,), own)


def forget(folder: RunStorage) -> None:
    """Delete what Ray Tune itself kept of this search, or left of a killed one."""
    filesystem, path = folder.open()
    for info in filesystem.get_file_info(pyarrow.fs.FileSelector(path)):
        if info.base_name.startswith("tune-"):
            filesystem.delete_dir(info.path)


def quiet() -> None:
    """Tune's own files and words that nobody needs: a trial's folder is a run's."""
    for name, value in {
        "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
        "TUNE_DISABLE_SIGINT_HANDLER": "1",
        "TUNE_GLOBAL_CHECKPOINT_S": "86400",
        "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
        "TUNE_WARN_THRESHOLD_S": "30",
        "TUNE_MAX_PENDING_TRIALS_PG": "1",
        "RAY_CHDIR_TO_TRIAL_DIR": "0",
        "RAY_AIR_NEW_OUTPUT": "0",
    }.items():
        os.environ.setdefault(name, value)
