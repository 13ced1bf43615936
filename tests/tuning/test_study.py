"""The study: its storage, its samplers, and what a killed process leaves."""

import warnings
from pathlib import Path

import optuna
import pytest
from helpers.limits import file_size_limit
from helpers.small_search import FRECHET
from optuna.trial import TrialState

from cl_ray.config import preset
from cl_ray.errors import StorageError, UserError
from cl_ray.storage import RunStorage
from cl_ray.tuning.search import prepare_search
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import (
    StudyStorage,
    TrialResult,
    ask_point,
    build_sampler,
    finish_trial,
    missing_trials,
    trial_results,
    unfinished_trials,
)
from cl_ray.tuning.tune import open_search_study

SPACE = Space.from_yaml("optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}")


def result(number: int, frechet: float, status: str = "finished") -> TrialResult:
    return TrialResult(number, status, {"optimizer.lr_g": 0.001}, {"frechet": frechet}, epoch=2)


def suggest(trial: optuna.Trial) -> dict[str, object]:
    return SPACE.suggest(trial, preset("quick"))


def new_study(tmp_path: Path) -> tuple[StudyStorage, optuna.Study]:
    storage = StudyStorage(RunStorage(str(tmp_path), "s"), None)
    return storage, optuna.create_study(storage=storage.open(), study_name="s")


def test_a_journal_cut_off_within_a_line_is_resumed(tmp_path: Path) -> None:
    storage, study = new_study(tmp_path)
    done = study.ask()
    finish_trial(study, done, result(0, 3.0), [FRECHET])
    running = ask_point(study, suggest, None)
    partial = study.ask()  # killed before its values were recorded
    with storage.path.open("a") as journal:
        journal.write('{"op_code": 8, "wor')  # SIGKILL came here
    (storage.path.parent / "study.log.lock").symlink_to(storage.path)

    resumed = optuna.load_study(study_name="s", storage=storage.open())
    assert [r.status for r in trial_results(resumed, 9)] == ["finished", "waiting", "waiting"]
    assert unfinished_trials(resumed) == [running["number"], partial.number]
    assert ask_point(resumed, suggest, running["number"]) == running
    drawn = ask_point(resumed, suggest, partial.number)
    assert ask_point(resumed, suggest, partial.number) == drawn
    assert drawn["values"]["optimizer.lr_g"] == resumed.trials[2].params["optimizer.lr_g"]


def test_the_study_records_how_each_trial_ended(tmp_path: Path) -> None:
    _, study = new_study(tmp_path)
    study.sampler = build_sampler("tpe", 0, 9)
    for number, status in enumerate(("finished", "stopped", "diverged", "failed")):
        finish_trial(study, study.ask(), result(number, 3.0 - number, status), [FRECHET])
    states = [t.state for t in study.trials]
    assert states == [TrialState.COMPLETE, TrialState.PRUNED, TrialState.COMPLETE, TrialState.FAIL]
    assert study.trials[2].value == FRECHET.worst
    assert study.best_trial.number == 0
    infeasible = [t.system_attrs.get("constraints") for t in study.trials]  # below all others
    assert infeasible == [[0.0], [0.0], [1.0], None]


def test_a_trial_enqueued_outside_of_the_space_fails_alone(tmp_path: Path) -> None:
    _, study = new_study(tmp_path)

    def suggest(trial: optuna.Trial) -> dict[str, object]:
        return {"batch_size": trial.suggest_categorical("batch_size", [32, 64])}

    study.enqueue_trial({"batch_size": 48})
    point = ask_point(study, suggest, None)
    assert point["number"] == 1
    assert point["values"]["batch_size"] in (32, 64)
    failed = trial_results(study, 9)[0]
    assert failed.status == "failed"
    assert failed.reason.startswith("enqueued outside of the space: ")


def test_what_is_missing_is_what_has_not_ended(tmp_path: Path) -> None:
    _, study = new_study(tmp_path)
    for number, status in enumerate(("finished", "stopped", "failed")):
        finish_trial(study, study.ask(), result(number, 3.0, status), [FRECHET])
    study.ask()  # its process was killed
    study.enqueue_trial({"optimizer.lr_g": 0.005})
    results = trial_results(study, 9)
    assert [r.status for r in results][3:] == ["waiting", "waiting"]
    assert results[4].values == {"optimizer.lr_g": 0.005}
    assert [missing_trials(results, trials) for trials in (2, 3, 4, 9)] == [0, 0, 1, 6]
    # Of those that wait, the ones within that number are shown.
    assert [len(trial_results(study, trials)) for trials in (2, 3, 4, 5, 9)] == [3, 3, 4, 5, 5]


def test_optuna_knows_the_metrics(flags: list[str], tmp_path: Path) -> None:
    more = ["--metric=frechet", "--metric=linear_probe"]
    search = prepare_search([*flags, f"--storage={tmp_path}", "--name=s", *more], "search")
    study = open_search_study(search, StudyStorage(search.folder, None))
    scores = {"frechet": 2.0, "linear_probe": 0.9}
    done = TrialResult(0, "finished", {}, scores)
    finish_trial(study, study.ask(), done, search.metrics)
    (trial, *_) = study.trials_dataframe().to_dict("records")
    assert {name: trial[f"values_{name}"] for name in scores} == scores


def test_samplers_are_reproducible_and_set_what_optuna_versions_differ_in() -> None:
    def draw(sampler: optuna.samplers.BaseSampler) -> list[float]:
        study = optuna.create_study(sampler=sampler)
        for _ in range(9):
            trial = study.ask()
            study.tell(trial, trial.suggest_float("a", 0, 1) + trial.suggest_float("b", 0, 1))
        return [t.params["a"] for t in study.trials]

    for kind in ("tpe", "random", "nsga2"):
        first, same, other = (draw(build_sampler(kind, seed, 9)) for seed in (3, 3, 4))
        assert first == same != other
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        explicit = optuna.samplers.TPESampler(
            seed=3, n_startup_trials=4, multivariate=True, constant_liar=True
        )
    assert draw(explicit) == draw(build_sampler("tpe", 3, 9))


def test_a_damaged_journal_is_named(tmp_path: Path) -> None:
    storage, _ = new_study(tmp_path)
    storage.path.write_text("no journal\nat all\n")
    with pytest.raises(UserError, match="another version"):
        storage.open()


@pytest.mark.parametrize("url", [None, "sqlite:///{tmp_path}/s.db"])
def test_a_full_disk_is_one_sentence(url: str | None, tmp_path: Path) -> None:
    url = url and url.format(tmp_path=tmp_path)
    storage = StudyStorage(RunStorage(str(tmp_path), "s"), url)
    study = optuna.create_study(storage=storage.open(), study_name="s")
    point = {"values": "x" * 1000}
    with file_size_limit(600), pytest.raises(StorageError) as caught, storage.errors():
        study.enqueue_trial({}, user_attrs=point)
    assert "cannot be written (" in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert str(caught.value).endswith(", then give the same command again.")
    again = optuna.load_study(study_name="s", storage=storage.open())
    number = len(again.trials)
    assert again.ask().number == number


def test_a_missing_database_driver_is_named(tmp_path: Path) -> None:
    storage = StudyStorage(RunStorage(str(tmp_path), "s"), "postgresql+psycopg2://nobody@nowhere/s")
    with pytest.raises(UserError, match="pip install psycopg2"):
        storage.open()


def test_a_search_killed_as_it_starts_is_resumed(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether its study exists or not, the initial points are tried, and once."""

    def kill(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    search = prepare_search([*flags, f"--storage={tmp_path}", "--name=s"], "search")
    fresh, storage = search, StudyStorage(search.folder, None)
    for step in ("optuna.create_study", "optuna.Study.enqueue_trial"):
        with monkeypatch.context() as patch:
            patch.setattr(step, kill)
            with pytest.raises(KeyboardInterrupt):
                open_search_study(search, storage)
        search = prepare_search([f"--storage={tmp_path}", "--resume=s"], "search")
    for _ in range(2):
        study = open_search_study(search, storage)
    assert {t.state for t in study.trials} == {TrialState.WAITING}
    waiting = [t.system_attrs["fixed_params"] for t in study.trials]
    assert waiting == search.space.initial_points(search.trial_config)

    with pytest.raises(UserError, match="The study s exists already: --resume s"):
        open_search_study(fresh, storage)
    # With trials and without its study it is refused: they would load others' checkpoints.
    search.trials_folder.write("0000/config.yaml", b"")
    (tmp_path / "s" / "study.log").unlink()
    with pytest.raises(UserError, match="There is no study s"):
        open_search_study(search, storage)
