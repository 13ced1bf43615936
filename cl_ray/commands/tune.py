"""`cl-ray tune`: search for the balance between G and D.

    cl-ray tune                                     # a small search: minutes on 2 cores
    cl-ray tune --name s1 --trials 16 --epochs 4 --metric linear_probe --seed 3
    cl-ray tune --space rates                       # learning rates only
    cl-ray tune --resume s1 --trials 24             # eight more trials
    cl-ray tune --scheduler pbt --trials 4          # population-based training
    cl-ray tune --metric frechet --metric linear_probe        # a Pareto front
    cl-ray train --config runs/s1/best.yaml

Ctrl-C ends the search. After that, or after a driver or machine was killed, `--resume NAME` resumes
each running trial from its last checkpoint.
"""

import sys
from collections.abc import Sequence

from cl_ray.cli import EXIT_INTERRUPTED
from cl_ray.signals import interrupt_kept


def command(arguments: Sequence[str], prog: str = "cl-ray tune") -> None:
    """Run `cl-ray tune`, which its messages call `prog`."""
    from cl_ray.tuning.search import prepare_search

    search, finished = None, False
    try:
        with interrupt_kept():
            search = prepare_search(arguments, prog)
            from cl_ray.tuning.tune import run_search  # slow, and the flags are right

            finished = run_search(search, prog)
    except KeyboardInterrupt:
        pass
    if not finished:
        hint = f"resume with: {search.resume_command(prog)}" if search else "nothing was started"
        print(f"{prog}: stopped; {hint}", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)
