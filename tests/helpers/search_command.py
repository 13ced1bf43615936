"""The search, as a user types it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "tuning" / "search.py")]


def search(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, timeout=400, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "160"}


def table(folder: Path) -> dict[int, dict[str, Any]]:
    rows = json.loads((folder / "leaderboard.json").read_text())
    return {row["trial"]: row for row in rows}
