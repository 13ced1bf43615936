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
from cl_ray.errors import UserError, without_keys
from cl_ray.training.alone import alone
from cl_ray.training.folder import Folder
from cl_ray.training.progress import clock, counted
from tuning.prepare import RECORD, Search, lacking, prepare

if TYPE_CHECKING:
    import optuna

    from tuning.study import Row, StudyFile

PROG = "python tuning/search.py"


def main(arguments: Sequence[str] | None = None) -> None:
    """The entry point; a user's mistake ends it with one sentence and status 1."""
    arguments = sys.argv[1:] if arguments is None else arguments
    console = Console()
    over, search = False, None
    try:
        search = prepare(arguments, PROG)
        with alone(search.folder, "search"):
            over = run(search, console)
    except UserError as error:
        print(f"{PROG}: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        pass
    if not over:
        way = f"go on with: {go_on(search)}" if search else "nothing was begun"
        print(f"{PROG}: stopped; {way}", file=sys.stderr)
        sys.exit(INTERRUPTED)


def run(search: Search, console: Console) -> bool:
    """Search until all trials are over; whether they are.

    Raises:
        UserError: The trials have no room, or none of them came to an end that counts.
    """
    import optuna

    from cl_ray.training.cluster import running_ray, see_that_nodes_share
    from tuning.display import Display
    from tuning.leaderboard import write
    from tuning.study import StudyFile, rows_of, unfinished

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options, folder = search.options, search.folder
    file = StudyFile(folder, options.study)
    study = study_of(search, file)
    introduce(search, study, console)
    missing = lacking()
    if missing:
        console.print(missing, soft_wrap=True)
    if unfinished(study) or len(rows_of(study)) < search.wanted:
        from tuning.room import share_out
        from tuning.tune_trials import job_of, quiet, run_trials

        quiet()
        with running_ray(options.address, options.dashboard, options.verbose, console) as local:
            if not options.verbose:
                for name in ("ray.tune", "ray.train"):
                    logging.getLogger(name).setLevel(logging.CRITICAL)
            room = share_out(search, local)
            if not folder.remote:
                see_that_nodes_share(folder)
            console.print(
                f"{room}." + (f" Waiting for {room.plan.waits_for}." if room.plan.waits_for else "")
            )
            from tuning.bell import bell_for
            from tuning.interrupt import CtrlC, Interrupted
            from tuning.recorder import Recorder

            bell = bell_for(search.name)
            with Display(console, search.metrics, options.epochs, search.wanted) as display:
                recorder = Recorder(
                    study,
                    file,
                    job_of(search, room, bell, signs=options.dashboard or not local),
                    display.show,
                    lambda rows: write(folder, rows, search.metrics, search.config),
                )
                with contextlib.suppress(Interrupted):
                    run_trials(search, study, room, recorder, CtrlC(bell, console.print))
    rows = rows_of(study)
    write(folder, rows, search.metrics, search.config)
    file.push()
    over = not unfinished(study) and len(rows) >= search.wanted
    conclude(search, rows, str(file), console, over)
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
    from tuning.study import has_study, open_study, rows_of, sampler_of

    storage = file.open()
    known = has_study(storage, search.name)
    if not (search.fresh and known):  # which is refused
        search.folder.write(RECORD, search.record())
    fresh = search.fresh or not (known or search.trials.there())
    options, done = search.options, 0
    if not fresh and options.sampler != "random":
        done = len(rows_of(open_study(storage, search.name, search.metrics, None, False)))
    sampler = sampler_of(options.sampler, options.seed + done, search.wanted)
    study = open_study(storage, search.name, search.metrics, sampler, fresh)
    if not rows_of(study):
        for point in search.space.known(search.base):
            study.enqueue_trial(point, skip_if_exists=True)
    return study


def introduce(search: Search, study: object, console: Console) -> None:
    """What will be done, in three lines."""
    from tuning.study import rows_of

    options = search.options
    names = " and ".join(
        f"{m.name} ({'larger' if m.larger else 'smaller'} is better)" for m in search.metrics
    )
    rows = rows_of(study)  # type: ignore[arg-type]
    done = f", {sum(r.status != 'running' for r in rows)} of them done" if rows else ""
    images = search.dataset.info.splits["train"].rows
    console.print(
        Text(
            f"Search {search.name}: {counted(search.wanted, 'trial')}{done}, each of up to "
            f"{counted(options.epochs, 'epoch')} of {images:,} images, for {names}.\n"
            f"Searched by {options.sampler}: {counted(len(search.space.parameters), 'field')}; "
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


def conclude(search: Search, rows: "list[Row]", study: str, console: Console, over: bool) -> None:
    """The leaderboard, where everything lies (the study at `study`), and how to go on."""
    from tuning.leaderboard import best_of, ranked, table_of

    if not rows:
        return
    console.print()
    order = ranked(rows, search.metrics)
    console.print(table_of(order, search.metrics, search.options.epochs, console))
    folder = search.folder
    best = best_of(rows, search.metrics)
    sentence = None
    if over:
        from tuning.report import write_report

        sentence = write_report(search, rows)
    seconds, epochs = sum(row.seconds for row in rows), sum(row.epoch for row in rows)
    where, config = shlex.quote(str(folder)), Folder(folder.uri, "best.yaml").uri
    look = search.options.study or not folder.remote  # it reads no object store
    lines = {
        "trained": f"{counted(epochs, 'epoch')} in {clock(seconds)} of training",
        "matters": sentence or "",
        "table": f"{folder}/leaderboard.csv, leaderboard.json",
        "report": f"{folder}/report.html" if sentence else "",
        "best": f"cl-ray train --config {shlex.quote(without_keys(config))}"
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
    storage = shlex.quote(without_keys(search.folder.storage))
    study = search.options.study or ""
    keys = " --study URL" if without_keys(study) != study else ""
    return f"{PROG} --resume {search.name} --storage {storage}{keys}"


if __name__ == "__main__":
    main()
