"""Users and passwords in what a user types are not shown."""

import io
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cl_ray.config import Config
from cl_ray.errors import UserError
from cl_ray.tuning.leaderboard import write_leaderboard
from cl_ray.tuning.prepare import RECORD, prepare_search
from cl_ray.tuning.study import StudyFile, TrialResult
from cl_ray.tuning.tune import go_on, print_summary


def test_keys_of_storage_and_study_are_not_shown(flags: list[str], bucket: Any) -> None:
    storage = f"--storage={bucket.uri('runs', 'somebody:secret@')}"
    search = prepare_search(
        [*flags, storage, "--name=s", "--study=mysql://me:word@host/db"], "search"
    )
    file = StudyFile(search.folder, search.options.study)
    rows = [
        TrialResult(
            n, "finished", {"optimizer.lr_g": 0.001}, {"frechet": 1.0 + n}, 1, history={1: 1.0 + n}
        )
        for n in range(2)
    ]
    out = io.StringIO()
    print_summary(search, rows, str(file), Console(file=out, width=400), over=True)
    said = out.getvalue()
    best = bucket.uri("runs/s/best.yaml")
    for line in (
        f"cl-ray train --config '{best}'\n",
        "optuna-dashboard mysql://host/db\n",
        f"{go_on(search)} --trials MORE\n",
        f"--resume s --storage '{bucket.uri('runs')}' --study URL --trials MORE\n",
    ):
        assert line in said

    write_leaderboard(search.folder, rows, search.metrics, search.config)
    assert Config.load(best).optimizer.lr_g == 0.001
    with pytest.raises(UserError, match=r"Cannot read the config s3://bucket/runs/s/worst\.yaml"):
        Config.load(best.replace("best", "worst"))

    search.folder.write(RECORD, search.record())
    with pytest.raises(UserError) as caught:
        prepare_search([storage, "--resume=s", "--study=mysql://me:other@host/more"], "search")
    assert "study was mysql://host/db, now mysql://host/more" in str(caught.value)
    with pytest.raises(UserError, match=r"not kept: give --study with them again"):
        prepare_search([storage, "--resume=s"], "search")
    again = prepare_search([storage, "--resume=s", "--study=mysql://me:new@host/db"], "search")
    assert again.options.study == "mysql://me:new@host/db"
    assert b"study: mysql://host/db\n" in again.record()
    for written in (said, str(caught.value), search.record().decode(), again.record().decode()):
        assert "secret" not in written
        assert "word" not in written


def test_a_study_on_an_object_store_is_shown_by_no_command(flags: list[str], bucket: Any) -> None:
    search = prepare_search([*flags, f"--storage={bucket.uri('runs')}", "--name=other"], "search")
    rows = [
        TrialResult(0, "finished", {"optimizer.lr_g": 0.001}, {"frechet": 1.0}, 1, history={1: 1.0})
    ]
    file = StudyFile(search.folder, search.options.study)
    out = io.StringIO()
    print_summary(search, rows, str(file), Console(file=out, width=400), over=False)
    assert "tensorboard --logdir s3://bucket/runs/other/trials\n" in out.getvalue()
    assert "optuna-dashboard" not in out.getvalue()


def test_a_study_without_keys_needs_no_second_mention(flags: list[str], tmp_path: Path) -> None:
    study = f"sqlite:///{tmp_path}/s.db"
    begun = prepare_search(
        [*flags, f"--storage={tmp_path}", "--name=s", f"--study={study}"], "search"
    )
    begun.folder.write(RECORD, begun.record())
    again = prepare_search([f"--storage={tmp_path}", "--resume=s"], "search")
    assert again.options.study == study
    assert "--study" not in go_on(again)
