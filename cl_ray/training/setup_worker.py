"""Starts a worker process of a local Ray: sets its environment variables, then runs Ray's program.

Ray's own script (2.60) imports ray for that, before the worker process imports it once more: half
a second of each process of Ray Train, which start one after another. It remains for what a
`runtime_env` may have besides variables.
"""

import json
import os
import sys
from importlib.util import find_spec

CONTEXT, LANGUAGE = "--serialized-runtime-env-context=", "--language="
"""Arguments of the raylet that are for this script; the others are the worker process's."""


def worker_command(arguments: list[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments of Python that start the worker process, and variables to set for it."""
    program = [a for a in arguments if not a.startswith((CONTEXT, LANGUAGE))]
    context = "".join(a.removeprefix(CONTEXT) for a in arguments if a.startswith(CONTEXT))
    more = {name: value for name, value in json.loads(context or "{}").items() if value}
    variables: dict[str, str] = more.pop("env_vars", {})
    executable = more.pop("py_executable", sys.executable)
    refers = any("$" in value for value in variables.values())  # to other variables
    if not (more or refers or executable != sys.executable or f"{LANGUAGE}PYTHON" not in arguments):
        return program, variables
    (folder,) = getattr(find_spec("ray"), "submodule_search_locations", [])
    return [os.path.join(folder, "_private", "workers", "setup_worker.py"), *arguments], {}


if __name__ == "__main__":
    program, variables = worker_command(sys.argv[1:])
    os.environ.update(variables)
    os.execv(sys.executable, [sys.executable, *program])
