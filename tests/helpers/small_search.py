"""Searches that end in seconds, and the command that runs them."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from cl_ray.commands.tune import command
from cl_ray.config import preset
from cl_ray.data.dataset import Dataset
from cl_ray.storage import RunStorage
from cl_ray.tuning.options import SearchOptions
from cl_ray.tuning.search import Search
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric

CONFIG = """
batch_size: 32
seed: 7
log_every: 5
threads: 1
generator: {width: 4, latent: 8}
discriminator: {width: 4, hidden: 16}
evaluation: {reference: mnist, samples: 60, images: 60}
"""

SPACE = """
optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}
optimizer.lr_d: {kind: log, low: 0.0001, high: 0.01}
discriminator.depth: {kind: int, low: 1, high: 3}
generator.depth: {kind: int, low: 1, high: 3, at_most: discriminator.depth}
"""

SCRIPT = Path(__file__).parents[2] / "tuning" / "search.py"
COMMAND = [sys.executable, str(SCRIPT)]

FRECHET, PROBE = SearchMetric("frechet", maximize=False), SearchMetric("linear_probe", True)


def prepared_search(storage: Path, metrics: list[SearchMetric], space: Space) -> Search:
    """Return the search `s` over the packaged digits, ready to run."""
    options = SearchOptions(name="s", storage=str(storage), epochs=3)
    folder, base = RunStorage(str(storage), "s"), preset("quick")
    digits = Dataset.open("mnist")
    return Search("s", folder, options, space, base, base, digits, metrics, fresh=False)


def run_search(*flags: str) -> subprocess.CompletedProcess[str]:
    """Run a search to its end."""
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, timeout=1200, env=environment
    )


def search_here(*flags: str, printed: io.StringIO | None = None) -> str:
    """Run a search to its end in this process; return what it printed.

    If it fails, `printed` has what it printed until then.
    """
    printed = printed or io.StringIO()
    with contextlib.redirect_stdout(printed):
        command(flags, "python tuning/search.py")
    return printed.getvalue()


def load_study(folder: Path) -> optuna.Study:
    """Return the study in a search's folder, of the same name."""
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    return optuna.load_study(study_name=folder.name, storage=storage)


def leaderboard(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the rows of leaderboard.json by trial."""
    rows = json.loads((folder / "leaderboard.json").read_text())
    return {row["trial"]: row for row in rows}
