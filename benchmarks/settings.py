"""Settings of its own for each objective: the same small search with `tuning/search.py` for all.

    python benchmarks/settings.py                        # every objective, 8 trials each
    python benchmarks/settings.py --only hinge minimax --trials 16
    python benchmarks/compare.py searched --seeds 3      # then: each by its own settings

Searched are both learning rates, the weight of the reconstruction and those of the penalties that
bound D; each trial is one pass over so many digits on one thread, for the Fréchet distance of
samples from noise. The quick preset's own settings are among the trials. What was best goes into
benchmarks/results/settings.jsonl as an objective's search ends; an objective that is there is not
searched again.
"""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import tyro
import yaml
from compare import PENALTIES

from cl_ray.losses.adversarial import OBJECTIVES

HERE = Path(__file__).parent
RESULT = HERE / "results" / "settings.jsonl"
SEARCH = HERE.parent / "tuning" / "search.py"
RATES = {
    "optimizer.lr_g": {"kind": "log", "low": 0.0003, "high": 0.004},
    "optimizer.lr_d": {"kind": "log", "low": 0.0001, "high": 0.003},
    "losses.reconstruction": {"kind": "log", "low": 4.0, "high": 80.0},
}
"""Fields that every objective has, with their ranges."""
JITTER = 0.7
"""Of G's latent vectors, in all of the searches."""
SLOPE = {"kind": "log", "low": 0.01, "high": 2.0}
BOUNDS: dict[str, dict[str, Any]] = {
    "wasserstein": {"losses.gradient_penalty": {"kind": "log", "low": 1.0, "high": 30.0}},
    "relativistic": {"losses.r1": SLOPE, "losses.r2": SLOPE},
}
"""What bounds D where it is not the approximate R1."""


def command(objective: str, trials: int, images: int, storage: Path) -> list[str]:
    """The search of one objective, or how it goes on."""
    if (storage / objective / "search.yaml").exists():
        return ["--resume", objective, "--storage", str(storage)]
    space = storage / f"{objective}.yaml"
    bound = BOUNDS.get(objective, {"losses.approximate_r1": SLOPE})
    space.write_text(yaml.safe_dump({**RATES, **bound}))
    assignments = (text.split("=") for text in PENALTIES.get(objective, "").split())
    begins = {name: float(value) for name, value in assignments}
    fixed = {
        "losses.objective": objective,
        "generator.prior": 0,
        "generator.latent_noise_std": JITTER,
    }
    fixed |= begins
    return [
        *("--name", objective, "--storage", str(storage), "--space", str(space)),
        *("--trials", str(trials), "--epochs", "1", "--images", str(images)),
        *("--scheduler", "none", "--cpus-per-trial", "1", "--metric", "frechet"),
        *("--preset", "quick"),
        *(part for field, value in fixed.items() for part in ("--set", f"{field}={value}")),
    ]


def leaderboard(objective: str, storage: Path) -> list[dict[str, Any]]:
    """Each trial's searched values and figure, the best first."""
    with (storage / objective / "leaderboard.csv").open() as file:
        rows = list(csv.DictReader(file))
    searched = [name for name in rows[0] if "." in name]
    return [
        {
            "status": row["status"],
            "frechet_over_baseline": round(float(row["frechet_over_baseline"] or "nan"), 2),
            **{name: float(f"{float(row[name]):.4g}") for name in searched},
        }
        for row in rows
    ]


def main(
    trials: int = 8,
    images: int = 20_000,
    only: tuple[str, ...] = tuple(OBJECTIVES),
    storage: Path = Path("runs/settings"),
) -> None:
    """Search the settings of each objective that has none yet.

    Args:
        trials: Of each objective's search.
        images: Digits of a trial's one pass.
        only: Objectives by name.
        storage: Folder of the searches, which go on where they were.
    """
    storage.mkdir(parents=True, exist_ok=True)
    there = (
        [json.loads(line) for line in RESULT.read_text().splitlines()] if RESULT.exists() else []
    )
    for objective in only:
        if objective in {row["objective"] for row in there}:
            continue
        arguments = command(objective, trials, images, storage)
        subprocess.run([sys.executable, str(SEARCH), *arguments], check=True)
        found = {"objective": objective, "images": images, "latent_noise_std": JITTER}
        with RESULT.open("a") as file:
            file.write(json.dumps({**found, "trials": leaderboard(objective, storage)}) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
