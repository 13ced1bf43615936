#!/usr/bin/env python3
"""Search for the balance between G and D: `cl-ray tune`, from a checkout that is not installed."""

import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cl_ray.cli import check_uris
from cl_ray.commands.tune import command
from cl_ray.errors import UserError
from cl_ray.signals import termination_as_interrupt
from cl_ray.uri import redact

PROG = "python tuning/search.py"


@termination_as_interrupt()
def main() -> None:
    """Run the search; on a user's mistake print one sentence and exit with status 1."""
    try:
        check_uris(sys.argv[1:])
        command(sys.argv[1:], PROG)
    except UserError as error:
        sys.exit(f"{PROG}: {error}")
    except Exception:
        sys.exit(redact(traceback.format_exc()))


if __name__ == "__main__":
    main()
