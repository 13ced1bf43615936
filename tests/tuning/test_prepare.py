"""Mistakes are answered with one sentence before anything starts."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from cl_ray.data.dataset import Dataset
from cl_ray.data.sources import SourceConfig, write_dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.errors import UserError
from cl_ray.training.lock import exclusive_lock
from cl_ray.tuning.prepare import RECORD, Search, prepare_search, subset
from cl_ray.tuning.tune import main

ROOT = Path(__file__).parent.parent.parent


def asked(flags: list[str], storage: Path, *more: str) -> Search:
    return prepare_search([*flags, f"--storage={storage}", *more], "search")


def begun(flags: list[str], storage: Path, *more: str) -> Search:
    search = asked(flags, storage, "--name=s", *more)
    search.folder.write(RECORD, search.record())
    return search


def complaint(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        prepare_search(list(arguments), "search")
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--metric=fid"], "metric 'fid' is not among what is measured"),
        (["--metric=frechet", "--set=evaluation.reference=none"], "without a reference"),
        (
            ["--metric=class_accuracy"],
            "'class_accuracy' is not among what is measured of networks "
            "that are told no classes (condition none): take frechet, ",
        ),
        (["--set=checkpoint.metric=evaluation/fid"], "checkpoint.metric 'evaluation/fid' is not"),
        (
            ["--set=checkpoint.metric=evaluation/frechet", "--set=evaluation.every=0"],
            "evaluation.every 0 is none: raise it",
        ),
        (["--metric=frechet", "--metric=frechet"], "names one of them twice"),
        (["--scheduler=pbt", "--workers=2"], "takes over another's weights in its own process"),
        (["--scheduler=pbt", "--metric=frechet", "--metric=knn_1"], "several metrics is refused"),
        (["--set=losses.temperature"], "is not a field and its value"),
        (["--set=losses.temperature=[1"], "set 'losses.temperature=[1' gives a value that is not"),
        (["--set=seed=2026-13-01"], "is not YAML (month must be in 1..12)"),
        (["--set=seed=1", "--set=seed.x=2"], "set seed and set seed.x are of the same field"),
        (["--set=seed.x=2", "--set=seed=1"], "set seed and set seed.x are of the same field"),
        (["--set=losses.temperature=0"], "losses.temperature 0 is refused"),
        (["--set=losses.heat=1"], "there is no field 'losses.heat'"),
        (["--space=/nowhere.yaml"], "Cannot read the space /nowhere.yaml"),
        (["--config=/nowhere.yaml"], "Cannot read the config /nowhere.yaml"),
        (["--name=a/b"], "must be one plain folder name"),
        (["--name=.."], "name '..' must be one plain folder name"),
        (["--resume=."], "resume '.' must be one plain folder name"),
        (["--resume="], "resume '' must be one plain folder name"),
        (["--storage="], "storage is empty"),
        (["--storage=", "--resume=a"], "storage is empty"),
        (["--data="], "data is empty"),
        (["--name=a", "--resume=b"], "There is no search"),
        (["--gpus-per-trial=1.5"], "must be a whole number or less than 1"),
        (["--gpus-per-trial=3", "--workers=2"], "or less than 1 for each of 2 workers"),
        (["--trials=0"], "trials 0 is refused"),
        (["--set=device=mps"], "device 'mps' is not there for this process: use auto, or cpu."),
        (["--data=/nowhere"], "/nowhere"),
        (["--storage=/proc/runs"], "cannot be written"),
        (["--set=pairs.candidates=400"], "pairs.candidates 400 needs more than the 300 images"),
    ],
)
def test_mistakes_are_named(flags: list[str], tmp_path: Path, more: list[str], words: str) -> None:
    storage = f"--storage={tmp_path / 'runs'}"
    assert words in complaint(*flags, storage, *more)
    assert not list(tmp_path.rglob(RECORD))


def test_figures_without_labels_or_reference_are_not_offered(
    flags: list[str], tmp_path: Path
) -> None:
    rows = Dataset.open("mnist").read("train", Dataset.open("mnist").pieces("train")[:1])
    pictures = [RawImage(image, None, f"digit {i}") for i, image in enumerate(rows.image[:120])]
    write_splits({"train": pictures}, str(tmp_path / "bare"), DatasetMetadata("digits", "MNIST"))
    labelled, bare = flags, [*flags[1:], f"--data={tmp_path / 'bare'}"]
    there, none = "--set=evaluation.reference=mnist", "--set=evaluation.reference=none"
    for data, reference, metrics, first in (
        (labelled, there, {"frechet", "linear_probe"}, "frechet"),
        (labelled, none, {"linear_probe"}, "linear_probe"),
        (bare, there, {"frechet"}, "frechet"),
        (bare, none, set(), "reconstruction"),
    ):
        told = complaint(*data, reference, f"--storage={tmp_path}", "--metric=nothing")
        offered = set(told.rpartition("take ")[2].removesuffix(".").split(", "))
        assert offered & {"frechet", "linear_probe", "reconstruction"} == {
            *metrics,
            "reconstruction",
        }
        assert [m.name for m in asked(data, tmp_path, reference).metrics] == [first]


@pytest.mark.parametrize("every", [0, 5])
def test_trials_are_measured_after_every_epoch_whatever_the_config_says(
    flags: list[str], tmp_path: Path, every: int
) -> None:
    search = asked(flags, tmp_path, f"--set=evaluation.every={every}")
    assert search.base.evaluation.every == 1
    assert search.config.evaluation.every == every  # of the run that best.yaml is for
    known = search.base.evaluation.samples, search.base.evaluation.images
    assert known == (60, 60)
    sparing = prepare_search([f"--storage={tmp_path}", f"--set=evaluation.every={every}"], "search")
    assert (sparing.base.evaluation.samples, sparing.base.evaluation.every) == (2000, 1)


def test_modes_are_offered_of_stacked_digits_only(flags: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "stacked")
    write_dataset(SourceConfig(source="stacked-mnist", out=out, count=300, test_count=60))
    data = [*flags[1:], f"--data={out}", "--set=evaluation.reference=auto"]
    search = asked(data, tmp_path, "--metric=modes", "--metric=mode_kl")
    assert [(m.name, m.larger) for m in search.metrics] == [("modes", True), ("mode_kl", False)]
    storage = f"--storage={tmp_path}"
    assert "of more than 200 classes" in complaint(*data, storage, "--metric=linear_probe")
    assert "not being stacked-mnist" in complaint(*flags, storage, "--metric=modes")


def test_how_many_are_of_their_class_is_offered_with_a_condition(
    flags: list[str], tmp_path: Path
) -> None:
    search = asked(flags, tmp_path, "--metric=class_accuracy", "--set=condition=projection")
    assert [(m.name, m.larger) for m in search.metrics] == [("class_accuracy", True)]


def test_several_metrics_are_taken_each_in_its_direction(flags: list[str], tmp_path: Path) -> None:
    search = asked(flags, tmp_path, "--metric=frechet", "--metric=linear_probe")
    assert [(m.name, m.larger) for m in search.metrics] == [
        ("frechet", False),
        ("linear_probe", True),
    ]
    assert search.options.early == "none"
    assert asked(flags, tmp_path).options.early == "asha"


def test_a_search_that_is_there_is_not_begun_again(flags: list[str], tmp_path: Path) -> None:
    begun(flags, tmp_path)
    with pytest.raises(UserError, match="is there already: --resume s goes on with it"):
        asked(flags, tmp_path, "--name=s")


def test_going_on_takes_more_trials_and_remembers_the_rest(
    flags: list[str], tmp_path: Path
) -> None:
    first = begun(flags, tmp_path, "--metric=knn_1", "--trials=3", "--set=losses.pair=0.3")
    again = prepare_search(["--resume=s", f"--storage={tmp_path}", "--trials=9"], "search")
    assert not again.fresh
    assert again.wanted == 9
    assert (again.space, again.base, again.metrics) == (first.space, first.base, first.metrics)
    assert again.base.losses.pair == 0.3


def test_going_on_with_other_settings_shows_the_difference(
    flags: list[str], tmp_path: Path
) -> None:
    begun(flags, tmp_path)
    resume = ["--resume=s", f"--storage={tmp_path}"]
    text = complaint(*resume, "--epochs=7", "--metric=knn_1")
    assert "epochs was 3, now 7" in text
    assert "metric was (), now ('knn_1',)" in text
    other = tmp_path / "other.yaml"
    other.write_text(
        "optimizer.lr_g: {kind: log, low: 0.0001, high: 0.1}\n"
        "optimizer.beta1: {kind: float, low: 0, high: 0.9}\n"
    )
    text = complaint(*resume, f"--space={other}")
    assert "optimizer.lr_g was {kind: log, low: 0.0001, high: 0.01}, now" in text
    assert "optimizer.beta1 was not searched, now {kind: float" in text
    assert "losses.pair was 0.1, now 0.5" in complaint(
        *resume, *flags[1:2], "--set=losses.pair=0.5"
    )
    prepare_search([*resume, *flags], "search")  # the same once more is no difference


def test_another_version_s_search_is_refused(flags: list[str], tmp_path: Path) -> None:
    search = begun(flags, tmp_path)
    saved = yaml.safe_load(search.record())
    search.folder.write(RECORD, yaml.safe_dump({**saved, "version": 99}).encode())
    text = complaint("--resume=s", f"--storage={tmp_path}")
    assert "another version of cl_ray (its search.yaml says version 99" in text


def test_two_processes_do_not_run_one_search(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = begun(flags, tmp_path)
    with exclusive_lock(search.folder, "search"), pytest.raises(SystemExit):
        main(["--resume=s", f"--storage={tmp_path}"])
    said = capsys.readouterr().err
    assert f"search.py: The search {search.folder} runs in another process (process " in said


def test_trials_see_the_first_whole_groups_of_rows() -> None:
    whole = Dataset.open("mnist")
    part = subset(whole, 3000)
    assert part.info.splits["train"].rows == 3072
    assert part.info.splits["test"] == whole.info.splits["test"]
    rows = part.read("train")
    assert rows.image.shape == (3072, 28, 28, 1)
    assert (rows.image == whole.read("train", whole.pieces("train")[:3]).image).all()
    assert subset(whole, 1_000_000).info.splits["train"].rows == 60_000


def test_the_file_itself_runs_and_says_how(tmp_path: Path) -> None:
    script = ROOT / "tuning" / "search.py"
    for flags, code, words in ((["--help"], 0, "--metric"), (["--resume=x"], 1, "no search")):
        done = subprocess.run(
            [sys.executable, script, *flags], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == code, done.stderr
        assert words in done.stdout + done.stderr
        assert "Traceback" not in done.stderr
