"""Users and passwords in what a user types are not shown."""

import io
from typing import Any

import pytest
from rich.console import Console

from cl_ray.errors import UserError
from tuning.prepare import RECORD, prepare
from tuning.search import conclude, go_on
from tuning.study import Row, StudyFile


def test_keys_of_storage_and_study_are_not_shown(flags: list[str], bucket: Any) -> None:
    storage = f"--storage={bucket.uri('runs', 'somebody:secret@')}"
    search = prepare([*flags, storage, "--name=s", "--study=mysql://me:word@host/db"], "search")
    file = StudyFile(search.folder, search.options.study)
    rows = [
        Row(n, "finished", {"optimizer.lr_g": 0.001}, {"frechet": 1.0 + n}, 1, history={1: 1.0 + n})
        for n in range(2)
    ]
    out = io.StringIO()
    conclude(search, rows, str(file), Console(file=out, width=400), over=True)
    said = out.getvalue()
    for line in (
        "optuna-dashboard mysql://host/db\n",
        f"{go_on(search)} --trials MORE\n",
        f"--resume s --storage '{bucket.uri('runs')}' --trials MORE\n",
    ):
        assert line in said

    search.folder.write(RECORD, search.record())
    with pytest.raises(UserError) as caught:
        prepare([storage, "--resume=s", "--study=mysql://me:other@host/more"], "search")
    assert "study was mysql://host/db, now mysql://host/more" in str(caught.value)
    again = prepare([storage, "--resume=s"], "search")
    assert again.options.study == search.options.study
    assert "secret" not in f"{said} {caught.value} {again.record().decode()}"
    assert "word" not in f"{said} {caught.value}"
