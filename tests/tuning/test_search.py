"""The command, as a user types it, with real Ray."""

import os
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest
from helpers.machine import machine
from helpers.search_command import search, table
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend


def test_more_at_once_than_the_machine_can_hold(flags: list[str], tmp_path: Path) -> None:
    all_of_them = os.cpu_count() or 1
    flags = [*flags, "--concurrent=4", f"--cpus-per-trial={all_of_them}"]
    done = search(*flags, f"--storage={tmp_path}")
    assert done.returncode == 1
    need = f"concurrent 4 with {all_of_them} CPU each need {4 * all_of_them} CPU; the cluster has"
    assert need in done.stderr
    assert "--concurrent" in done.stderr or "--cpus-per-trial" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def cluster() -> Iterator[str]:
    """The address of a cluster that is there already."""
    with machine(cpus=1) as context:
        yield context.address_info["address"]


def test_a_trial_that_cannot_even_be_set_up_has_failed_and_the_search_ends(
    flags: list[str], cluster: str, tmp_path: Path
) -> None:
    """Only the cluster's own machines know that they have no such device."""
    done = search(
        *flags, f"--storage={tmp_path}", "--name=f", "--trials=1", "--set=device=mps",
        f"--address={cluster}",
    )  # fmt: skip
    reason = "device 'mps' is not there for this process: use auto, or cpu."
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == (
        f"python tuning/search.py: No trial came to an end that counts: trial 0 failed: {reason}\n"
    )
    assert f"trial 0 is tried once more: {reason}\n" in done.stdout
    (row,) = table(tmp_path / "f").values()
    assert (row["status"], row["reason"]) == ("failed", reason)


def test_a_population_takes_over_weights_and_architecture(flags: list[str], tmp_path: Path) -> None:
    done = search(
        *flags, f"--storage={tmp_path}", "--name=p", "--scheduler=pbt", "--population=4",
        "--epochs=4", "--concurrent=2", "--metric=reconstruction",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = table(tmp_path / "p")
    assert {row["status"] for row in rows.values()} == {"finished"}
    assert sorted(rows) == [0, 1, 2, 3]
    study = optuna.load_study(
        study_name="p", storage=JournalStorage(JournalFileBackend(str(tmp_path / "p/study.log")))
    )
    changed = 0
    for trial in study.trials:
        begun, ended = trial.user_attrs["values"], rows[trial.number]["values"]
        if begun == ended:
            continue
        changed += 1
        donors = [t.user_attrs["values"] for t in study.trials if t.number != trial.number]
        assert any(
            d["generator.depth"] == ended["generator.depth"]
            and d["discriminator.depth"] == ended["discriminator.depth"]
            for d in donors
        )
    assert changed
