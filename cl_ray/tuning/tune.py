"""Run a prepared search, and print what it found."""

import contextlib
import logging
import shlex
import warnings
from dataclasses import replace

import optuna
from optuna.trial import TrialState
from rich.console import Console
from rich.text import Text

from cl_ray.console import PlainConsole, print_fields
from cl_ray.errors import UserError, format_duration, pluralize, storage_errors
from cl_ray.storage import RunStorage
from cl_ray.training.preflight import check_shared_storage, exclusive_lock
from cl_ray.training.ray_compat import configure_tune_environment
from cl_ray.training.ray_session import ray_session
from cl_ray.tuning import leaderboard
from cl_ray.tuning.search import Search
from cl_ray.tuning.study import (
    StudyStorage,
    TrialResult,
    build_sampler,
    missing_trials,
    trial_results,
)

_SCHEDULERS = {
    "asha": "ASHA stops trials early",
    "median": "the median rule stops trials early",
    "none": "no trial is stopped early",
    "pbt": "the worst trials copy the best ones' weights",
}


def run_search(search: Search, prog: str) -> bool:
    """Run a search to its end or Ctrl-C; return whether all trials have ended.

    Raises:
        UserError: Another process runs it, its trials do not fit on the cluster, or none of them
            can be ranked.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    console, trials = PlainConsole(), search.options.trials
    if not console.is_terminal:
        console.width = 10_000  # a log has room for all columns of a table
    with storage_errors(search.folder), exclusive_lock(search.folder, "search"):
        search = replace(search, folder=search.folder.take_lease())
        storage = StudyStorage(search.folder, search.options.study)
        study = open_search_study(search, storage)
        results = trial_results(study, trials)
        _print_plan(search, results, console)
        if missing_trials(results, trials):
            _run_on_ray(search, study, storage, console)
            results = trial_results(study, trials)
        leaderboard.write_leaderboard(search, results)
        storage.push()
        finished = not missing_trials(results, trials)
        print_summary(search, results, storage, console, finished, prog)
    if finished and not any(result.is_valid for result in results):
        first = next(result for result in results if result.has_ended)
        raise UserError(
            "No trial has metrics that can be ranked: trial "
            f"{first.number} {first.status}: {first.reason}"
        )
    return finished


def _run_on_ray(
    search: Search, study: optuna.Study, storage: StudyStorage, console: Console
) -> None:
    """Run the trials that are left, on a Ray that is started or joined for them."""
    options = search.options
    configure_tune_environment()
    with ray_session(options.address, options.dashboard, options.verbose, console) as local:
        # Imported once Ray starts: importing Tune takes seconds, and reads the environment.
        from cl_ray.tuning.callbacks import InterruptCallback, Interrupted, StudyCallback
        from cl_ray.tuning.runner import allocate_trials, run_trials

        if not options.verbose:
            for name in ("ray.tune", "ray.train"):
                logging.getLogger(name).setLevel(logging.CRITICAL)
        left = missing_trials(trial_results(study, options.trials), options.trials)
        resources = allocate_trials(search, local, left)
        check_shared_storage(search.folder)
        waits_for = resources.each.waits_for
        console.print(f"{resources}." + (f" Waiting for {waits_for}." if waits_for else ""))
        with leaderboard.SearchProgress(
            console, search.metrics, options.epochs, options.trials
        ) as progress:
            recorder = StudyCallback(search, study, storage, progress.show)
            interrupt = InterruptCallback(console.print)
            with contextlib.suppress(Interrupted), storage.errors():
                run_trials(search, study, resources, recorder, interrupt)


def open_search_study(search: Search, storage: StudyStorage) -> optuna.Study:
    """Return the search's study, created if there is none yet, and write search.yaml.

    A search that is killed at any moment can be resumed or started again.

    Raises:
        UserError: The study of a new search exists already, or that of a search with trials does
            not.
    """
    opened, name, options = storage.open(), search.name, search.options
    exists = name in optuna.get_all_study_names(opened)
    if search.fresh and exists:
        raise UserError(
            f"The study {name} exists already: --resume {name} resumes it, another --name starts "
            "a new one."
        )
    search.save()
    if exists:
        study = optuna.load_study(study_name=name, storage=opened)
    elif search.fresh or not search.trials_folder.exists():
        directions = [metric.direction for metric in search.metrics]
        study = optuna.create_study(storage=opened, study_name=name, directions=directions)
    else:
        raise UserError(f"There is no study {name}: start it with --name {name}.")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        study.set_metric_names([metric.name for metric in search.metrics])
    # A resumed sampler must not repeat its draws; the random one does not.
    started = len([t for t in study.get_trials(deepcopy=False) if t.state != TrialState.WAITING])
    study.sampler = build_sampler(
        options.sampler,
        options.seed + (0 if options.sampler == "random" else started),
        options.trials,
        len(search.metrics),
    )
    if not started:
        for point in search.space.initial_points(search.trial_config):
            study.enqueue_trial(point, skip_if_exists=True)
    return study


def _print_plan(search: Search, results: list[TrialResult], console: Console) -> None:
    """Print what the search will do."""
    options = search.options
    metrics = " and ".join(
        f"{m.name} ({'larger' if m.maximize else 'smaller'} is better)" for m in search.metrics
    )
    ended = sum(result.has_ended for result in results)
    done = f", {ended} of them done" if ended else ""
    images = search.dataset.info.splits["train"].rows
    console.print(
        Text(
            f"Search {search.name}: {pluralize(options.trials, 'trial')}{done}, each of up to "
            f"{pluralize(options.epochs, 'epoch')} of {images:,} images, for {metrics}.\n"
            f"Sampler {options.sampler}: {pluralize(len(search.space.parameters), 'field')}; "
            f"{_SCHEDULERS[options.resolved_scheduler]}."
        ),
        soft_wrap=True,
    )


def print_summary(
    search: Search,
    results: list[TrialResult],
    storage: StudyStorage,
    console: Console,
    finished: bool,
    prog: str,
) -> None:
    """Print the leaderboard, where the files are, and how to continue.

    If all trials have ended, write report.html.
    """
    if not results:
        return
    metrics = search.metrics
    ranked = leaderboard.rank_trials(results, metrics)
    console.print()
    console.print(leaderboard.leaderboard_table(ranked, metrics, search.options.epochs, console))
    summary = None
    if finished:
        from cl_ray.tuning.report import write_report

        summary = write_report(search, results)
    folder = search.folder
    seconds, epochs = sum(r.seconds for r in results), sum(r.epoch for r in results)
    config = shlex.quote(RunStorage(folder.uri, "best.yaml").uri)
    best = leaderboard.describe_best(results, metrics)
    found = leaderboard.search_front(results, metrics) if len(metrics) > 1 else []
    front = ", ".join(str(result.number) for result in found)
    # optuna-dashboard reads no object store.
    dashboard = search.options.study or not folder.remote
    lines = {
        "best": best or "no trial can be ranked",
        "front": front
        and f"trials {front} (*): no other is as good in all metrics and better in one",
        "trained": f"{pluralize(epochs, 'epoch')} in {format_duration(seconds)} of training",
        "summary": summary,
        "table": f"{folder}/leaderboard.csv, leaderboard.json",
        "report": summary and f"{folder}/report.html",
        "train": best and f"cl-ray train --config {config}",
        "look": f"tensorboard --logdir {shlex.quote(str(folder))}/trials",
        "study": dashboard and f"optuna-dashboard {shlex.quote(str(storage))}",
        "resume": finished
        and search.options.scheduler != "pbt"
        and f"{search.resume_command(prog)} --trials MORE",
    }
    console.print()
    print_fields(console, {name: value for name, value in lines.items() if value}, 9)
