"""The record of a search: order, fronts, and what a killed process leaves."""

import csv
import io
import json
from pathlib import Path

import optuna
import pytest
from optuna.trial import TrialState
from rich.console import Console

from cl_ray.config import Config, preset
from cl_ray.errors import UserError
from cl_ray.storage import RunStorage
from cl_ray.tuning.importance import comparable, importances, what_mattered
from cl_ray.tuning.leaderboard import (
    best_trials,
    pareto_front,
    rank_trials,
    table_of,
    write_leaderboard,
)
from cl_ray.tuning.prepare import prepare_search
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import (
    SearchMetric,
    StudyFile,
    TrialResult,
    build_sampler,
    finish_trial,
    open_study,
    resume_trial,
    trial_results,
    unfinished_trials,
)
from cl_ray.tuning.tune import study_of

FRECHET, PROBE = SearchMetric("frechet", larger=False), SearchMetric("linear_probe", larger=True)
SPACE = Space.from_yaml("optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}")


def row(number: int, frechet: float, probe: float = 0.5, status: str = "finished") -> TrialResult:
    metrics = {"frechet": frechet, "linear_probe": probe}
    bad = status in ("diverged", "collapsed", "failed")
    values = {"optimizer.lr_g": 0.0001 * (number + 1)}
    return TrialResult(number, status, values, {} if bad else metrics, epoch=2, reason=status * bad)


ROWS = [
    row(0, 9.0, 0.9),
    row(1, 1.0, 0.1, "stopped"),
    row(2, 5.0, 0.95),
    row(3, 0.0, 0.0, "diverged"),
    row(4, 2.0, 0.8),
    row(5, 0.0, 0.0, "failed"),
]


def test_the_best_come_first_and_what_went_wrong_comes_last() -> None:
    assert [r.number for r in rank_trials(ROWS, [FRECHET])] == [1, 4, 2, 0, 3, 5]
    assert [r.number for r in rank_trials(ROWS, [PROBE])] == [2, 0, 4, 1, 3, 5]
    best = best_trials(ROWS, [FRECHET])
    assert best is not None
    assert best.number == 4  # of those that ran to their end


def test_the_front_has_those_that_none_beats_in_both() -> None:
    both = [FRECHET, PROBE]
    counted = [r for r in ROWS if r.counts]
    assert {r.number for r in pareto_front(counted, both)} == {1, 2, 4}  # 0 is worse than 2 in both
    assert [r.number for r in rank_trials(ROWS, both)][3:] == [0, 3, 5]


def test_the_tables_and_the_best_config_are_readable(tmp_path: Path) -> None:
    folder = RunStorage(str(tmp_path), "s")
    write_leaderboard(folder, ROWS, [FRECHET], preset("quick"))
    config = Config.load(tmp_path / "s" / "best.yaml")
    assert config.optimizer.lr_g == pytest.approx(0.0005)
    assert config == preset("quick").model_copy(update={"optimizer": config.optimizer})
    table = json.loads((tmp_path / "s" / "leaderboard.json").read_text())
    assert [line["trial"] for line in table] == [1, 4, 2, 0, 3, 5]
    lines = list(csv.DictReader(io.StringIO((tmp_path / "s" / "leaderboard.csv").read_text())))
    assert [line["trial"] for line in lines] == ["1", "4", "2", "0", "3", "5"]
    assert lines[1]["frechet"] == "2.0"
    assert lines[4]["reason"] == "diverged"


@pytest.mark.parametrize("width", [60, 80, 300])
def test_no_value_of_a_table_is_cut_short(width: int) -> None:
    values = {f"losses.weight_{i}": 0.0123 + i for i in range(12)}
    console = Console(width=width, file=io.StringIO(), record=True)
    rows = [TrialResult(0, "finished", values, {"frechet": 1.5}, 2), row(1, 1.25)]
    console.print(table_of(rows, [FRECHET], 2, console))
    whole = console.export_text(clear=False)
    assert all(f"{value:.3g}" in whole for value in values.values()), whole
    assert "…" not in whole
    console.export_text()
    console.print(table_of(rows, [FRECHET], 2, console, fold=False))
    assert len(console.export_text().strip().splitlines()) == 3


def begin(tmp_path: Path) -> tuple[StudyFile, optuna.Study]:
    file = StudyFile(RunStorage(str(tmp_path), "s"), None)
    study = open_study(file.open(), "s", [FRECHET], build_sampler("random", 0, 9), fresh=True)
    return file, study


def test_a_journal_cut_short_in_mid_line_is_gone_on_with(tmp_path: Path) -> None:
    file, study = begin(tmp_path)
    done, running = study.ask(), study.ask()
    for trial in (done, running):
        trial.set_user_attr("values", SPACE.suggest(trial, preset("quick")))
    finish_trial(study, done, row(0, 3.0), [FRECHET])
    drawn = dict(running.params)
    with file.path.open("a") as journal:
        journal.write('{"op_code": 8, "wor')  # SIGKILL came here
    (file.path.parent / "study.log.lock").symlink_to(file.path)

    again = open_study(file.open(), "s", [FRECHET], build_sampler("random", 1, 9), fresh=False)
    assert [r.status for r in trial_results(again)] == ["finished", "running"]
    assert unfinished_trials(again) == [1]
    taken = resume_trial(again, 1)
    assert SPACE.suggest(taken, preset("quick")) == drawn  # the same values once more
    finish_trial(again, taken, row(1, 2.0), [FRECHET])
    third = open_study(file.open(), "s", [FRECHET], build_sampler("random", 1, 9), fresh=False)
    assert [r.metrics["frechet"] for r in trial_results(third)] == [3.0, 2.0]


def test_the_sampler_hears_how_a_trial_ended(tmp_path: Path) -> None:
    _, study = begin(tmp_path)
    for r in (row(0, 3.0), row(1, 2.0, status="stopped"), row(2, 0, status="diverged")):
        finish_trial(study, study.ask(), r, [FRECHET])
    finish_trial(study, study.ask(), row(3, 0, status="failed"), [FRECHET])
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL]
    assert study.trials[2].value == max(t.value for t in study.trials if t.value is not None)
    assert study.best_trial.number == 0


def test_a_study_is_not_begun_twice_nor_gone_on_with_before(tmp_path: Path) -> None:
    file, _ = begin(tmp_path)
    with pytest.raises(UserError, match="is there already: --resume s"):
        open_study(file.open(), "s", [FRECHET], None, fresh=True)
    with pytest.raises(UserError, match="There is no study other"):
        open_study(file.open(), "other", [FRECHET], None, fresh=False)


def test_a_search_killed_as_it_begins_is_gone_on_with(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its study was made or not, what is known is tried, and once."""

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    search = prepare_search([*flags, f"--storage={tmp_path}", "--name=s"], "search")
    for step in (optuna, "create_study"), (optuna.Study, "enqueue_trial"):
        with monkeypatch.context() as patch:
            patch.setattr(*step, killed)
            with pytest.raises(KeyboardInterrupt):
                study_of(search, StudyFile(search.folder, None))
        search = prepare_search([f"--storage={tmp_path}", "--resume=s"], "search")
    study = study_of(search, StudyFile(search.folder, None))
    study = study_of(search, StudyFile(search.folder, None))
    assert {t.state for t in study.trials} == {TrialState.WAITING}
    waiting = [t.system_attrs["fixed_params"] for t in study.trials]
    assert waiting == search.space.known(search.base)


def test_a_search_with_trials_whose_study_is_gone_is_not_begun_anew(
    flags: list[str], tmp_path: Path
) -> None:
    """Its trials would take up others' checkpoints."""
    search = prepare_search([*flags, f"--storage={tmp_path}", "--name=s"], "search")
    study_of(search, StudyFile(search.folder, None))
    search.trials.write("0000/config.yaml", b"")
    (tmp_path / "s" / "study.log").unlink()
    again = prepare_search([f"--storage={tmp_path}", "--resume=s"], "search")
    with pytest.raises(UserError, match="There is no study s"):
        study_of(again, StudyFile(again.folder, None))


def test_a_damaged_study_is_refused(tmp_path: Path) -> None:
    file, _ = begin(tmp_path)
    file.path.write_text("no journal\nat all\n")
    with pytest.raises(UserError, match="another version"):
        open_study(file.open(), "s", [FRECHET], None, fresh=False)


def test_storage_that_lacks_its_driver_names_the_package(tmp_path: Path) -> None:
    file = StudyFile(RunStorage(str(tmp_path), "s"), "postgresql+psycopg2://nobody@nowhere/s")
    with pytest.raises(UserError, match="pip install psycopg2"):
        file.open()


def test_what_mattered_is_found_among_trials_of_the_same_length() -> None:
    space = Space.from_yaml(
        "optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}\n"
        "optimizer.lr_d: {kind: log, low: 0.0001, high: 0.01}"
    )
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    rows = []
    for number in range(40):
        values = space.suggest(study.ask(), preset("quick"))
        cost = abs(values["optimizer.lr_g"] - 0.001) * 1000
        history = {1: 10 * cost, **({2: cost} if number % 4 else {})}
        rows.append(TrialResult(number, "finished", values, {"frechet": cost}, 2, history=history))
    alike, epoch = comparable(rows)
    assert epoch == 2
    assert len(alike) == 30
    weights = importances(alike, epoch, FRECHET, space)
    assert weights["optimizer.lr_g"] > 0.8
    assert sum(weights.values()) == pytest.approx(1)
    sentence = what_mattered(alike, epoch, FRECHET, weights)
    assert "frechet went by lr_g" in sentence
    assert comparable(rows[:1]) == (rows[:1], 1)
