"""`python tuning/search.py`: search for the balance between G and D.

    python tuning/search.py                                     # a small sweep, minutes on 2 cores
    python tuning/search.py --name s1 --trials 16 --epochs 4 --metric linear_probe --seed 3
    python tuning/search.py --resume s1 --trials 24             # eight more
    python tuning/search.py --scheduler pbt --population 4      # weights are taken over
    python tuning/search.py --metric frechet --metric linear_probe        # a Pareto front
    cl-ray train --config runs/s1/best.yaml

Ctrl-C has the trials save where they are and ends the search, a second one ends it at once; after
that, or a killed driver or machine, `--resume NAME` goes on where each trial was.
"""

import contextlib
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if __package__ in (None, ""):  # run as a file, its folder is on the path in place of the one above
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from rich.console import Console
from rich.text import Text

from cl_ray.cli import INTERRUPTED
from cl_ray.errors import UserError, redact_credentials
from cl_ray.storage import RunStorage
from cl_ray.training.lock import exclusive_lock
from cl_ray.training.progress import format_duration, pluralize
from cl_ray.tuning.prepare import RECORD, Search, lacking, prepare_search

if TYPE_CHECKING:
    import optuna

    from cl_ray.tuning.study import StudyFile, TrialResult

PROG = "python tuning/search.py"


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; a user's mistake ends it with one sentence and status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    over, search = False, None
    try:
        search = prepare_search(arguments, PROG)
        with exclusive_lock(search.folder, "search"):
            over = run_search(search, console)
    except UserError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        pass
    if not over:
        way = f"go on with: {go_on(search)}" if search else "nothing was begun"
        print(f"{PROG}: stopped; {way}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run_search(search: Search, console: Console) -> bool:
    """Search until all trials are over; whether they are.

    Raises:
        UserError: The trials have no room, or none of them came to an end that counts.
    """
    import optuna

    from cl_ray.training.cluster import check_shared_storage, ray_session
    from cl_ray.tuning.leaderboard import write_leaderboard
    from cl_ray.tuning.progress import SearchProgress
    from cl_ray.tuning.study import StudyFile, trial_results, unfinished_trials

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options, folder = search.options, search.folder
    file = StudyFile(folder, options.study)
    study = study_of(search, file)
    introduce(search, study, console)
    missing = lacking()
    if missing:
        console.print(missing, soft_wrap=True)
    if unfinished_trials(study) or len(trial_results(study)) < search.wanted:
        from cl_ray.tuning.resources import allocate_trials
        from cl_ray.tuning.runner import build_trial_context, quiet, run_trials

        quiet()
        with ray_session(options.address, options.dashboard, options.verbose, console) as local:
            if not options.verbose:
                for name in ("ray.tune", "ray.train"):
                    logging.getLogger(name).setLevel(logging.CRITICAL)
            room = allocate_trials(search, local)
            if not folder.remote:
                check_shared_storage(folder)
            console.print(
                f"{room}." + (f" Waiting for {room.plan.waits_for}." if room.plan.waits_for else "")
            )
            from cl_ray.tuning.interrupt import InterruptCallback, Interrupted
            from cl_ray.tuning.stop_signal import start_stop_signal
            from cl_ray.tuning.study_callback import StudyCallback

            bell = start_stop_signal(search.name)
            with SearchProgress(console, search.metrics, options.epochs, search.wanted) as display:
                recorder = StudyCallback(
                    study,
                    file,
                    build_trial_context(search, room, bell, signs=options.dashboard or not local),
                    display.show,
                    lambda rows: write_leaderboard(folder, rows, search.metrics, search.config),
                )
                with contextlib.suppress(Interrupted):
                    run_trials(
                        search, study, room, recorder, InterruptCallback(bell, console.print)
                    )
    rows = trial_results(study)
    write_leaderboard(folder, rows, search.metrics, search.config)
    file.push()
    over = not unfinished_trials(study) and len(rows) >= search.wanted
    print_summary(search, rows, str(file), console, over)
    if over and not any(row.counts for row in rows):
        first = rows[0]
        raise UserError(
            f"No trial came to an end that counts: trial {first.number} {first.status}: "
            f"{first.reason}"
        )
    return over


def study_of(search: Search, file: "StudyFile") -> "optuna.Study":
    """The search's study, made where there is none yet, and its record.

    Killed at any moment, it is there to go on with, or it can be begun.

    Raises:
        UserError: A new search's study is there already; or that of an old one, which has trials,
            is not.
    """
    from cl_ray.tuning.study import build_sampler, has_study, open_study, trial_results

    storage = file.open()
    known = has_study(storage, search.name)
    if not (search.fresh and known):  # which is refused
        search.folder.write(RECORD, search.record())
    fresh = search.fresh or not (known or search.trials.there())
    options, done = search.options, 0
    if not fresh and options.sampler != "random":
        done = len(trial_results(open_study(storage, search.name, search.metrics, None, False)))
    sampler = build_sampler(options.sampler, options.seed + done, search.wanted)
    study = open_study(storage, search.name, search.metrics, sampler, fresh)
    if not trial_results(study):
        for point in search.space.known(search.base):
            study.enqueue_trial(point, skip_if_exists=True)
    return study


def introduce(search: Search, study: object, console: Console) -> None:
    """What will be done, in three lines."""
    from cl_ray.tuning.study import trial_results

    options = search.options
    names = " and ".join(
        f"{m.name} ({'larger' if m.larger else 'smaller'} is better)" for m in search.metrics
    )
    rows = trial_results(study)  # type: ignore[arg-type]
    done = f", {sum(r.status != 'running' for r in rows)} of them done" if rows else ""
    images = search.dataset.info.splits["train"].rows
    console.print(
        Text(
            f"Search {search.name}: {pluralize(search.wanted, 'trial')}{done}, each of up to "
            f"{pluralize(options.epochs, 'epoch')} of {images:,} images, for {names}.\n"
            f"Searched by {options.sampler}: {pluralize(len(search.space.parameters), 'field')}; "
            f"{EARLY[options.early]}."
        ),
        soft_wrap=True,
    )


EARLY = {
    "asha": "successive halving stops trials early",
    "median": "the median rule stops trials early",
    "none": "no trial is stopped early",
    "pbt": "the worse trials take over the better ones' weights",
}


def print_summary(
    search: Search, rows: "list[TrialResult]", study: str, console: Console, over: bool
) -> None:
    """The leaderboard, where everything lies (the study at `study`), and how to go on."""
    from cl_ray.tuning.leaderboard import best_trials, rank_trials, table_of

    if not rows:
        return
    console.print()
    order = rank_trials(rows, search.metrics)
    console.print(table_of(order, search.metrics, search.options.epochs, console))
    folder = search.folder
    best = best_trials(rows, search.metrics)
    sentence = None
    if over:
        from cl_ray.tuning.report import write_report

        sentence = write_report(search, rows)
    seconds, epochs = sum(row.seconds for row in rows), sum(row.epoch for row in rows)
    where, config = shlex.quote(str(folder)), RunStorage(folder.uri, "best.yaml").uri
    look = search.options.study or not folder.remote  # it reads no object store
    lines = {
        "trained": f"{pluralize(epochs, 'epoch')} in {format_duration(seconds)} of training",
        "matters": sentence or "",
        "table": f"{folder}/leaderboard.csv, leaderboard.json",
        "report": f"{folder}/report.html" if sentence else "",
        "best": f"cl-ray train --config {shlex.quote(redact_credentials(config))}"
        if best
        else "no trial came to an end",
        "look": f"tensorboard --logdir {where}/trials",
        "study": f"optuna-dashboard {shlex.quote(study)}" if look else "",
        "go on": f"{go_on(search)} --trials MORE" if over else "",
    }
    console.print()
    for name, value in lines.items():
        if value:
            console.print(Text.assemble((f"{name:<9}", "bold"), value), soft_wrap=True)


def go_on(search: Search) -> str:
    """The command that goes on with it."""
    storage = shlex.quote(redact_credentials(search.folder.storage))
    study = search.options.study or ""
    keys = " --study URL" if redact_credentials(study) != study else ""
    return f"{PROG} --resume {search.name} --storage {storage}{keys}"


if __name__ == "__main__":
    main()
