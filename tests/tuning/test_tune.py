"""A search whose trial, then driver, is killed, that is interrupted, and that goes on."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
import pytest
from helpers.processes import children
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from cl_ray.config import Config

ROOT = Path(__file__).parent.parent.parent
COMMAND = [sys.executable, str(ROOT / "tuning" / "search.py")]
# Of eight draws with seed 7 two have the quantile that no image of these has a negative for.
FAILING = "pairs.quantile: {kind: choice, values: [0.1, 0.999999]}\n"
DIVERGING = "losses.adversarial: {kind: choice, values: [1.0, 1.0e+39]}\n"


def search(*flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *flags], capture_output=True, text=True, timeout=300, env=environment()
    )


def environment() -> dict[str, str]:
    return {**os.environ, "COLUMNS": "160"}


def start(log: Path, *flags: str) -> subprocess.Popen[bytes]:
    with log.open("w") as out:
        return subprocess.Popen([*COMMAND, *flags], stdout=out, stderr=out, env=environment())


def wait_for(condition: Callable[[], Any], process: Any, what: str) -> None:
    deadline = time.monotonic() + 150
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain for {what}"
        assert process.poll() is None, f"the search ended before {what}"
        time.sleep(0.05)


def lines(folder: Path, trial: int) -> list[dict[str, Any]]:
    text = (folder / "trials" / f"{trial:04d}" / "metrics.jsonl").read_text()
    return [json.loads(line) for line in text.splitlines()]


def table(folder: Path) -> dict[int, dict[str, Any]]:
    rows = json.loads((folder / "leaderboard.json").read_text())
    return {row["trial"]: row for row in rows}


def ended(folder: Path) -> int:
    """How many trials are over."""
    return sum(row["status"] != "running" for row in table(folder).values())


@dataclass
class Story:
    """A search that was killed, interrupted and gone on with.

    Args:
        folder: Its folder.
        said: What each of the commands printed.
        kept: The leaderboard and every trial's lines after each command.
        victim: The process of a trial that was killed.
    """

    folder: Path
    victim: int = 0
    said: list[str] = field(default_factory=list)
    kept: list[tuple[dict[int, dict[str, Any]], dict[int, list[dict[str, Any]]]]] = field(
        default_factory=list
    )

    def keep(self, said: str) -> None:
        self.said.append(said)
        begun = sorted(int(p.name) for p in (self.folder / "trials").iterdir())
        whole = {
            n: lines(self.folder, n) for n in begun if (self.run(n) / "metrics.jsonl").exists()
        }
        there = (self.folder / "leaderboard.json").exists()
        self.kept.append((table(self.folder) if there else {}, whole))

    def run(self, trial: int) -> Path:
        return self.folder / "trials" / f"{trial:04d}"


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory, flags: list[str]) -> Story:
    """Six trials: a trial's process is killed, then the driver, then Ctrl-C, then two more."""
    storage = tmp_path_factory.mktemp("searches")
    space = storage / "space.yaml"
    space.write_text(Path(flags[2].split("=")[1]).read_text() + FAILING + DIVERGING)
    story = Story(storage / "s")
    first = [
        *flags[:2], f"--space={space}", f"--storage={storage}", "--name=s", "--trials=6",
        "--epochs=3", "--concurrent=2", "--sampler=random", "--scheduler=none", "--seed=7",
    ]  # fmt: skip
    resume = [f"--storage={storage}", "--resume=s"]
    log = storage / "log"

    process = start(log, *first)
    try:
        manifest = story.run(0) / "checkpoints"
        wait_for(lambda: list(manifest.glob("*/manifest.json")), process, "a first checkpoint")
        trials = [p for p, title in children(process.pid) if "ray::Trial_s" in title]
        assert trials
        story.victim = trials[0]
        os.kill(story.victim, signal.SIGKILL)
        wait_for(lambda: (story.folder / "leaderboard.json").exists(), process, "a trial's end")
        process.kill()
        process.wait()
    finally:
        process.kill()
    story.keep(log.read_text())

    process = start(log, *resume)
    try:
        before = ended(story.folder)
        wait_for(lambda: ended(story.folder) > before, process, "another trial's end")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 130, log.read_text()
    finally:
        process.kill()
    story.keep(log.read_text())

    done = search(*resume, "--trials=8")
    assert done.returncode == 0, done.stdout + done.stderr
    story.keep(done.stdout)
    return story


def test_every_trial_comes_to_an_end_once(story: Story) -> None:
    rows = table(story.folder)
    assert sorted(rows) == list(range(8))
    assert {row["status"] for row in rows.values()} <= {"finished", "failed", "diverged"}
    for number, row in rows.items():
        epochs = [line["epoch"] for line in lines(story.folder, number)]
        whole = row["status"] == "finished"
        assert epochs == [1, 2, 3] if whole else epochs == list(range(1, len(epochs) + 1))


def test_what_was_done_before_is_neither_lost_nor_repeated(story: Story) -> None:
    for before, (rows, trials) in enumerate(story.kept[:-1]):
        after, later = story.kept[before + 1]
        for number, row in rows.items():
            if row["status"] not in ("running",):
                place = {"place", "front"}
                assert {k: v for k, v in after[number].items() if k not in place} == {
                    k: v for k, v in row.items() if k not in place
                }
        for number, epochs in trials.items():
            # The very lines, seconds and all: an epoch that was trained is not trained again.
            measured = [e for e in epochs if any(k.startswith("evaluation/") for k in e)]
            assert later[number][: len(measured)] == measured


def test_a_trial_that_fails_is_tried_twice_and_the_rest_goes_on(story: Story) -> None:
    rows = table(story.folder)
    failed = [row for row in rows.values() if row["status"] == "failed"]
    assert failed
    for row in failed:
        assert row["values"]["pairs.quantile"] == 0.999999
        assert "no negative as far as" in row["reason"]
    assert [r for r in rows.values() if r["status"] == "finished"]
    assert re.search(
        rf"trial \d is tried once more: process {story.victim} on [\d.]+: was killed, ran out of",
        story.said[0],
    )


def test_a_trial_that_diverges_scores_worst_and_says_why(story: Story) -> None:
    diverged = [row for row in table(story.folder).values() if row["status"] == "diverged"]
    assert diverged
    for row in diverged:
        assert row["values"]["losses.adversarial"] == 1e39
        assert re.search(r"became (nan|-?inf) at step 1", row["reason"])
    study = load(story.folder)
    assert {study.trials[row["trial"]].value for row in diverged} == {1e6}


def load(folder: Path) -> optuna.Study:
    storage = JournalStorage(JournalFileBackend(str(folder / "study.log")))
    return optuna.load_study(study_name="s", storage=storage)


def test_the_study_remembers_all(story: Story) -> None:
    study = load(story.folder)
    rows = table(story.folder)
    assert len(study.trials) == 8
    for trial in study.trials:
        assert trial.params == rows[trial.number]["values"]
        if rows[trial.number]["status"] == "finished":
            assert trial.value == rows[trial.number]["metrics"]["frechet"]
            assert sorted(trial.intermediate_values) == [1, 2, 3]


def test_the_best_is_a_config_to_train_with(story: Story) -> None:
    rows = table(story.folder)
    finished = [row for row in rows.values() if row["status"] == "finished"]
    best = min(finished, key=lambda row: row["metrics"]["frechet"])
    config = Config.load(story.folder / "best.yaml")
    assert config.optimizer.lr_g == best["values"]["optimizer.lr_g"]
    assert config.generator.depth == best["values"]["generator.depth"]
    assert config.evaluation.samples == 60
    assert (config.name, config.epochs) == (None, 1)
    assert rows[best["trial"]]["place"] == 1


def test_trials_can_be_looked_at(story: Story) -> None:
    rows = table(story.folder)
    finished = next(n for n, row in rows.items() if row["status"] == "finished")
    events = EventAccumulator(str(story.run(finished) / "tensorboard"))
    events.Reload()
    tags = events.Tags()
    assert {"evaluation/frechet", "g/reconstruction"} <= set(tags["scalars"])
    assert len(events.Scalars("evaluation/frechet")) == 3
    assert "_hparams_/session_start_info" in events.summary_metadata
    page = (story.folder / "report.html").read_text()
    for words in ("frechet by trial", "lr_g against lr_d", "G depth against D depth", "the best, "):
        assert words in page
    assert 'src="data:image/png;base64,' in page
    assert 'src="https://' not in page


def test_it_says_what_it_does(story: Story) -> None:
    killed, interrupted, last = story.said
    assert "2 trials at once, 1 CPU each" in killed or "2 trials at once" in killed
    # Which epoch's line is missing is chance: a process may be killed before it has said it.
    assert re.search(r"trial \d epoch \d/3  frechet [\d.]+", killed)
    storage = story.folder.parent
    assert f"go on with: python tuning/search.py --resume s --storage {storage}" in interrupted
    assert "Traceback" not in killed + interrupted + last
    assert f"cl-ray train --config {story.folder}/best.yaml" in last
    assert "goes on after epoch" in interrupted + last


def test_nothing_of_ray_is_left(story: Story) -> None:
    left = {p.name for p in story.folder.iterdir()}
    assert left == {
        ".lock", "best.yaml", "leaderboard.csv", "leaderboard.json", "report.html", "search.yaml",
        "study.log", "trials",
    }  # fmt: skip


def test_a_search_that_is_over_says_so_without_ray(story: Story) -> None:
    before = {p: p.read_bytes() for p in story.folder.rglob("metrics.jsonl")}
    done = search(f"--storage={story.folder.parent}", "--resume=s")
    assert done.returncode == 0, done.stderr
    assert "Starting Ray" not in done.stdout
    assert {p: p.read_bytes() for p in story.folder.rglob("metrics.jsonl")} == before
