"""`cl-ray tune`: search for the balance between G and D.

    cl-ray tune                                     # a small search: minutes on 2 cores
    cl-ray tune --name s1 --trials 16 --epochs 4 --metric linear_probe --seed 3
    cl-ray tune --space rates                       # learning rates only
    cl-ray tune --resume s1 --trials 24             # eight more trials
    cl-ray tune --scheduler pbt --trials 4          # population-based training
    cl-ray tune --metric frechet --metric linear_probe        # a Pareto front
    cl-ray train --config runs/s1/best.yaml

On Ctrl-C the trials save where they are and the search ends; a second Ctrl-C ends it at once. After
that, or after a driver or machine was killed, `--resume NAME` resumes each trial where it was.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from cl_ray.cli import EXIT_INTERRUPTED
from cl_ray.signals import interrupt_kept

if TYPE_CHECKING:
    from cl_ray.tuning.search import Search


def command(arguments: Sequence[str], prog: str = "cl-ray tune") -> None:
    """Run `cl-ray tune`, which its messages call `prog`."""
    from cl_ray.tuning.search import prepare_search

    search, finished = None, False
    try:
        with interrupt_kept():
            search = prepare_search(arguments, prog)
            finished = _run(search, prog)
    except KeyboardInterrupt:
        pass
    if not finished:
        hint = f"resume with: {search.resume_command(prog)}" if search else "nothing was started"
        print(f"{prog}: stopped; {hint}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def _run(search: "Search", prog: str) -> bool:
    from cl_ray.console import PlainConsole
    from cl_ray.errors import storage_errors
    from cl_ray.training.preflight import exclusive_lock
    from cl_ray.tuning.tune import run_search

    with storage_errors(search.folder), exclusive_lock(search.folder, "search"):
        search = replace(search, folder=search.folder.take_lease())
        console = PlainConsole()
        if not console.is_terminal:
            console.width = 10_000  # a log has room for all columns of a table
        return run_search(search, console, prog)
