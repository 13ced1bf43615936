"""What earlier attempts left: a run goes on, begins again, or is refused, before Ray starts."""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.run_folder import leave, trained_run
from rich.console import Console

import cl_ray
from cl_ray.config import Config
from cl_ray.errors import UserError

Damage = Callable[[Path], None]


def lose(pattern: str) -> Damage:
    """Deletes the files of that pattern."""

    def damage(folder: Path) -> None:
        found = list(folder.glob(pattern))
        assert found
        for file in found:
            file.unlink()

    return damage


@pytest.fixture(scope="module")
def run(make_digits: Any) -> Any:
    return trained_run(make_digits(40))


def told(config: Config, storage: Path) -> tuple[str, str]:
    """What `train` prints and how it ends, with a cluster to join that is not there."""
    console = Console(file=io.StringIO(), width=60)
    config = config.model_copy(update={"storage": str(storage), "name": "demo"})
    with pytest.raises(UserError) as ended:
        cl_ray.train(config, cl_ray.Launch(address="nonsense"), console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue(), str(ended.value)


@pytest.mark.parametrize(
    ("damages", "words"),
    [
        ([lose("config.yaml")], "has checkpoints and no config.yaml"),
        (
            [lose("checkpoints/*/manifest.json")],
            "is damaged: none of its checkpoints (step-00000001, step-00000002) has a whole "
            "manifest.json",
        ),
        ([lose("config.yaml"), lose("checkpoints/*/manifest.json")], "and no config.yaml"),
    ],
)
def test_a_damaged_run_is_not_begun_again(
    run: Any, tmp_path: Path, damages: list[Damage], words: str
) -> None:
    leave(run, tmp_path, 1)
    folder = leave(run, tmp_path, 2)
    assert "no joining" in told(run.config, tmp_path)[1]  # whole, it goes on
    for damage in damages:
        damage(folder)
    before = sorted(folder.rglob("*"))
    printed, ended = told(run.config, tmp_path)
    assert printed == ""
    assert words in ended
    assert ended.startswith(f"The run {folder} ")
    assert ended.endswith(": put back what is missing, or take another --name.")
    assert sorted(folder.rglob("*")) == before


def test_the_only_checkpoint_of_a_finished_run_was_once_whole(run: Any, tmp_path: Path) -> None:
    folder = leave(run, tmp_path, 2)
    lose("checkpoints/*/manifest.json")(folder)
    assert "is damaged: none of its checkpoints (step-00000002)" in told(run.config, tmp_path)[1]
    (folder / "checkpoints" / "best.txt").unlink()
    (folder / "generator.safetensors").write_bytes(b"weights")
    assert "is damaged: none of its checkpoints (step-00000002)" in told(run.config, tmp_path)[1]


def test_a_run_that_was_killed_in_its_first_checkpoint_begins_again(
    run: Any, tmp_path: Path
) -> None:
    folder = leave(run, tmp_path, 2)
    lose("checkpoints/*/manifest.json")(folder)
    (folder / "checkpoints" / "best.txt").unlink()
    printed, ended = told(run.config, tmp_path)
    assert printed.startswith(f"The run {folder} has no checkpoint yet and begins again")
    assert "no joining" in ended


def test_a_run_that_begins_again_says_what_is_new(run: Any, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    folder.mkdir()
    assert told(run.config, tmp_path)[0] == ""  # there was no attempt yet
    (folder / "config.yaml").write_text(run.config.to_yaml())
    same = (
        f"The run {folder} has no checkpoint yet and begins again, with the settings of its "
        "config.yaml"
    )
    assert told(run.config, tmp_path)[0] == f"{same}.\n"
    other = run.config.model_copy(update={"seed": 5, "epochs": 9})
    assert told(other, tmp_path)[0] == f"{same}, but seed was 0, now 5; epochs was 1, now 9.\n"
    leave(run, tmp_path, 2)
    printed, ended = told(other, tmp_path)
    assert printed == ""
    assert "has another config (seed was 0, now 5): leave those out" in ended
