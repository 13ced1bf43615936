"""Flags of a search: what they make, what is refused before Ray starts, and resuming."""

import io
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from helpers.datasets import mnist, write_images
from helpers.small_search import FRECHET, PROBE, SCRIPT
from rich.console import Console

import cl_ray
from cl_ray.base_config import FORMAT_VERSION
from cl_ray.cli import main
from cl_ray.config import Config
from cl_ray.data.config import PHOTO_VIEWS, ViewConfig
from cl_ray.data.dataset import UNLABELLED, Dataset
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset
from cl_ray.errors import UserError
from cl_ray.training.preflight import exclusive_lock
from cl_ray.tuning.leaderboard import write_leaderboard
from cl_ray.tuning.search import SEARCH_FILE, Search, prepare_search, subset_dataset
from cl_ray.tuning.study import SearchMetric, StudyStorage, TrialResult
from cl_ray.tuning.tune import print_summary


def prepare(flags: list[str], storage: Path, *more: str) -> Search:
    return prepare_search([*flags, f"--storage={storage}", *more], "search")


def saved(flags: list[str], storage: Path, *more: str) -> Search:
    search = prepare(flags, storage, "--name=s", *more)
    search.save()
    return search


def refusal(*arguments: str) -> str:
    with pytest.raises(UserError) as caught:
        prepare_search(list(arguments), "search")
    return str(caught.value)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metric=fid"], "metric 'fid' is not"),
        (["--metric=frechet", "--set=evaluation.reference=none"], "without a reference"),
        (["--metric=class_accuracy"], "(condition none): use frechet, "),
        (["--set=checkpoint.metric=evaluation/fid"], "checkpoint.metric 'evaluation/fid' is not"),
        (
            ["--set=checkpoint.metric=evaluation/frechet", "--set=evaluation.every=0"],
            "checkpoint.metric 'evaluation/frechet' is of an evaluation",
        ),
        (["--metric=frechet", "--metric=frechet"], "names one of them twice"),
        (["--scheduler=pbt", "--workers=2"], "copies another trial's weights within its own"),
        (["--scheduler=pbt", "--metric=frechet", "--metric=knn_1"], "give one --metric"),
        (["--scheduler=asha", "--metric=frechet", "--metric=knn_1"], "stops trials by one metric"),
        (["--scheduler=pbt", "--trials=1"], "trials 1 is one alone: take --trials 2 or more"),
        (["--set=losses.temperature"], "is not a field and its value"),
        (["--set=losses.temperature=[1"], "set 'losses.temperature=[1' gives a value that is not"),
        (["--set=seed=2026-13-01"], "is not YAML (month must be in 1..12)"),
        (["--set=seed.x=2", "--set=seed=1"], "set seed and set seed.x are of the same field"),
        (["--set=losses.temperature=0"], "losses.temperature 0 is refused"),
        (["--set=losses.heat=1"], "there is no field 'losses.heat'"),
        (["--space=/nowhere.yaml"], "or one of balance, objectives, rates, template"),
        (["--config=/nowhere.yaml"], "Cannot read the config /nowhere.yaml"),
        (["--name=.."], "name '..' must be one plain folder name"),
        (["--resume="], "resume '' must be one plain folder name"),
        (["--storage=", "--resume=a"], "storage is empty"),
        (["--data="], "data is empty"),
        (["--name=a", "--resume=b"], "There is no search"),
        (["--gpus-per-trial=3", "--workers=2"], "gpus_per_trial 3 is more than one for each"),
        (["--trials=0"], "trials 0 is refused"),
        (["--workers=3"], "In the trials' config: batch_size 32 cannot be divided among 3 workers"),
        (["--set=device=mps"], "device 'mps' is not"),
        (["--data=/nowhere"], "/nowhere"),
        (["--storage=/proc/runs"], "cannot be written"),
        (
            ["--set=pairs.candidates=400"],
            "pairs.candidates 400 must be less than the number of images",
        ),
    ],
)
def test_mistakes_are_named(
    flags: list[str], tmp_path: Path, more: list[str], message: str
) -> None:
    assert message in refusal(*flags, f"--storage={tmp_path / 'runs'}", *more)
    assert not list(tmp_path.rglob(SEARCH_FILE))


def test_only_available_metrics_are_offered(flags: list[str], tmp_path: Path) -> None:
    unlabelled = write_images(tmp_path / "bare", train=(mnist("train", 120)[0], [None] * 120))
    bare = [*flags[1:], f"--data={unlabelled}"]
    reference, none = "--set=evaluation.reference=mnist", "--set=evaluation.reference=none"
    known = {"frechet", "linear_probe", "reconstruction"}
    for data, flag, metrics, default in (
        (flags, reference, known, "frechet"),
        (flags, none, known - {"frechet"}, "linear_probe"),
        (bare, reference, known - {"linear_probe"}, "frechet"),
        (bare, none, {"reconstruction"}, "reconstruction"),
    ):
        message = refusal(*data, flag, f"--storage={tmp_path}", "--metric=nothing")
        offered = set(message.rpartition("use ")[2].removesuffix(".").split(", "))
        assert offered & known == metrics
        assert [m.name for m in prepare(data, tmp_path, flag).metrics] == [default]
    conditional = prepare(flags, tmp_path, "--metric=class_accuracy", "--set=condition=projection")
    assert conditional.metrics == [SearchMetric("class_accuracy", maximize=True)]


def test_a_relative_reference_becomes_absolute(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(cl_ray.__file__).parent / "evaluation"
    monkeypatch.chdir(folder)
    search = prepare(flags, tmp_path, "--set=evaluation.reference=mnist.safetensors")
    for config in (search.config, search.trial_config):
        assert config.evaluation.reference == str(folder / "mnist.safetensors")


def test_modes_are_offered_for_stacked_digits_only(flags: list[str], tmp_path: Path) -> None:
    out = str(tmp_path / "stacked")
    write_dataset(SourceConfig(source="stacked-mnist", out=out, count=300, test_count=60))
    data = [*flags[1:], f"--data={out}", "--set=evaluation.reference=auto"]
    search = prepare(data, tmp_path, "--metric=modes", "--metric=mode_kl")
    assert search.metrics == [SearchMetric("modes", True), SearchMetric("mode_kl", False)]
    storage = f"--storage={tmp_path}"
    assert "of more than 200 classes" in refusal(*data, storage, "--metric=linear_probe")
    assert "not being stacked-mnist" in refusal(*flags, storage, "--metric=modes")
    assert search.config.views == ViewConfig()  # digits, though in three channels


def test_photographs_have_views_of_their_own_as_in_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (300, 28, 28, 3), np.uint8)
    write_images(tmp_path / "data", train=(pixels, [None] * 300))
    flags = [f"--data={tmp_path}/data", "--metric=reconstruction", "--set=seed=1"]
    assert prepare(flags, tmp_path).config.views == PHOTO_VIEWS
    assert "The views are those of photographs" in capsys.readouterr().out
    search = saved(flags, tmp_path, "--set=views.flip=0")
    unflipped = PHOTO_VIEWS.model_copy(update={"flip": 0.0})
    assert search.config.views == search.trial_config.views == unflipped
    resumed = prepare_search(["--resume=s", f"--storage={tmp_path}"], "search")
    assert resumed.config.views == unflipped


def test_the_default_preset_follows_the_images_wherever_they_are_named(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 64, 64, 3), np.uint8)
    data = write_images(tmp_path / "data", train=(pixels, [None] * 200))
    (tmp_path / "file.yaml").write_text(f"data: {data}\n")
    for named in (f"--data={data}", f"--set=data={data}", f"--config={tmp_path}/file.yaml"):
        search = prepare([named, "--metric=reconstruction"], tmp_path)
        assert search.config.preset == "photos-64"


def test_trials_are_evaluated_after_every_epoch_and_economically(
    flags: list[str], tmp_path: Path
) -> None:
    search = prepare(flags, tmp_path, "--set=evaluation.every=0")
    assert search.trial_config.evaluation.every == 1
    assert search.config.evaluation.every == 0  # of the run that best.yaml is for
    assert search.trial_config.evaluation.samples == 60  # the config's own
    default = prepare([], tmp_path, "--set=evaluation.every=0").trial_config.evaluation
    assert (default.samples, default.every) == (2000, 1)
    given = prepare([], tmp_path, "--set=evaluation.samples=10000").trial_config.evaluation
    assert (given.samples, given.images) == (10_000, 2000)


def test_relative_data_are_found_from_anywhere(
    digits: str, flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(digits).parent)
    more = [*flags[1:], "--name=rel"]
    search = prepare([f"--data={Path(digits).name}", *more], tmp_path)
    assert search.config.data == search.options.data == digits
    search.save()
    monkeypatch.chdir(tmp_path)
    for given in ([], [f"--data={digits}"]):
        resumed = prepare_search([*given, f"--storage={tmp_path}", "--resume=rel"], "search")
        assert resumed.config.data == digits


def test_several_metrics_turn_early_stopping_off(flags: list[str], tmp_path: Path) -> None:
    search = prepare(flags, tmp_path, "--metric=frechet", "--metric=linear_probe")
    assert search.metrics == [FRECHET, PROBE]
    assert search.options.resolved_scheduler == "none"
    assert prepare(flags, tmp_path).options.resolved_scheduler == "asha"


def test_a_resumed_search_keeps_its_settings_and_shows_differences(
    flags: list[str], tmp_path: Path
) -> None:
    first = saved(flags, tmp_path, "--metric=knn_1", "--trials=3", "--set=losses.pair=0.3")
    with pytest.raises(UserError, match="exists already: --resume s resumes it"):
        prepare(flags, tmp_path, "--name=s")
    resume = ["--resume=s", f"--storage={tmp_path}"]
    resumed = prepare_search([*resume, "--trials=9"], "search")
    assert not resumed.fresh
    assert resumed.options.trials == 9
    assert resumed.trial_config.losses.pair == 0.3
    for name in ("space", "config", "trial_config", "metrics"):
        assert getattr(resumed, name) == getattr(first, name)
    prepare_search([*resume, *flags, "--set=losses.pair=0.3"], "search")  # no difference
    message = refusal(*resume, "--epochs=7", "--metric=frechet")
    assert "epochs was 3, now 7" in message
    assert "metric was ('knn_1',), now ('frechet',)" in message
    other = tmp_path / "other.yaml"
    other.write_text(
        "optimizer.lr_g: {kind: log, low: 0.0001, high: 0.1}\n"
        "optimizer.beta1: {kind: float, low: 0, high: 0.9}\n"
    )
    message = refusal(*resume, f"--space={other}")
    assert "optimizer.lr_g was {kind: log, low: 0.0001, high: 0.01}, now" in message
    assert "optimizer.beta1 was not searched, now {kind: float" in message
    assert "losses.pair was 0.3, now 0.5" in refusal(*resume, flags[1], "--set=losses.pair=0.5")
    record = yaml.safe_load((tmp_path / "s" / SEARCH_FILE).read_text())
    (tmp_path / "s" / SEARCH_FILE).write_text(yaml.safe_dump({**record, "format_version": 99}))
    assert "later version of cl_ray (format 99)" in refusal(*resume)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "/s/search.yaml is not the record of a search (it has no 'options')"),
        ("a: [", "/s/search.yaml is not the record of a search (it has no 'options')"),
        (
            f"format_version: {FORMAT_VERSION}\noptions: {{}}\n",
            "(it has no 'study_has_credentials')",
        ),
        ("options: {}\n", "was written by an earlier version of cl_ray (format 1)"),
    ],
)
def test_a_foreign_record_is_refused(
    text: str, message: str, flags: list[str], tmp_path: Path
) -> None:
    saved(flags, tmp_path)
    (tmp_path / "s" / SEARCH_FILE).write_text(text)
    error = refusal("--resume=s", f"--storage={tmp_path}")
    assert message in error
    assert error.endswith("another --name.")


def test_other_images_are_refused(
    flags: list[str], make_digits: Callable[[int], str], tmp_path: Path
) -> None:
    data = tmp_path / "data"
    data.symlink_to(make_digits(300))
    saved([f"--data={data}", *flags[1:]], tmp_path)
    resume = ["--resume=s", f"--storage={tmp_path}"]
    prepare_search(resume, "search")
    data.unlink()
    data.symlink_to(make_digits(310))
    assert refusal(*resume).startswith(f"{data} has other images or classes than it was started")


def test_how_a_search_was_launched_does_not_stick(flags: list[str], tmp_path: Path) -> None:
    launch = ["--verbose", "--dashboard", "--address=head:6379"]
    first = saved(flags, tmp_path, "--concurrent=2", *launch)
    assert (first.options.verbose, first.options.address) == (True, "head:6379")
    assert first.resume_command("cl-ray tune").endswith(" --address head:6379")
    resumed = prepare_search(["--resume=s", f"--storage={tmp_path}"], "search").options
    assert (resumed.verbose, resumed.dashboard, resumed.address) == (False, False, None)
    assert resumed.concurrent == 2
    again = prepare_search(["--resume=s", f"--storage={tmp_path}", "--verbose"], "search")
    assert again.options.verbose


def test_trials_are_the_population_of_pbt(flags: list[str], tmp_path: Path) -> None:
    search = saved(flags, tmp_path, "--scheduler=pbt", "--trials=4")
    resume = ["--resume=s", f"--storage={tmp_path}"]
    assert prepare_search(resume, "search").options.trials == 4
    assert "trials was 4, now 5" in refusal(*resume, "--trials=5")
    assert "--trials MORE" not in summary(search, RESULTS, finished=True)


def test_one_process_at_a_time_runs_a_search(
    flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    search = saved(flags, tmp_path)
    with exclusive_lock(search.folder, "search"), pytest.raises(SystemExit):
        main(["tune", "--resume=s", f"--storage={tmp_path}"])
    error = capsys.readouterr().err
    assert error.startswith(f"cl-ray: The search {search.folder} is in use by another process")


def test_trials_see_the_first_whole_row_groups() -> None:
    whole = Dataset.open("mnist")
    part = subset_dataset(whole, 3000)
    for split in ("validation", "test"):
        assert part.info.splits[split] == whole.info.splits[split]
    rows = part.read("train")
    assert part.info.splits["train"].rows == len(rows.image) == 3072
    assert (rows.image == whole.read("train", whole.row_groups("train")[:3]).image).all()
    assert subset_dataset(whole, 1_000_000).info.splits["train"].rows == 55_000


def test_a_subset_counts_its_unlabelled_images(tmp_path: Path) -> None:
    images, labels = mnist("train", 2048)
    some = [None if number % 3 else int(label) for number, label in enumerate(labels)]
    whole = Dataset.open(write_images(tmp_path / "some", train=(images, some)))
    part = subset_dataset(whole, 1000)
    rows = part.read("train")
    assert len(rows.id) == 1024
    assert rows.label is not None
    assert part.info.splits["train"].unlabelled == (rows.label == UNLABELLED).sum() > 0


def test_the_script_is_the_command_by_another_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(flag: str) -> object:
        monkeypatch.setattr("sys.argv", [str(SCRIPT), flag, f"--storage={tmp_path}"])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return end.value.code

    assert run("--help") == 0
    assert "usage: python tuning/search.py" in capsys.readouterr().out
    assert str(run("--resume=x")).startswith("python tuning/search.py: There is no search")


def summary(search: Search, results: list[TrialResult], finished: bool) -> str:
    out = io.StringIO()
    storage = StudyStorage(search.folder, search.options.study)
    print_summary(search, results, storage, Console(file=out, width=400), finished, "cl-ray tune")
    return out.getvalue()


RESULTS = [
    TrialResult(n, "finished", {"optimizer.lr_g": 0.001}, {"frechet": 1.0 + n}, 1, history={1: 1.0})
    for n in range(2)
]


def test_a_secret_of_the_study_is_neither_shown_nor_stored(flags: list[str], bucket: Any) -> None:
    """A driver that reads credentials from the URL alone gets them; they are given again."""
    storage = f"--storage={bucket.uri('runs')}"
    search = prepare_search(
        [*flags, storage, "--name=s", "--study=mssql+pyodbc://me:word@host/db?driver=a&PWD=word"],
        "search",
    )
    shown = summary(search, RESULTS, finished=True)
    best = bucket.uri("runs/s/best.yaml")
    for line in (
        f"cl-ray train --config '{best}'\n",
        "optuna-dashboard 'mssql+pyodbc://host/db?driver=a'\n",
        f"cl-ray tune --resume s --storage '{bucket.uri('runs')}' --study URL --trials MORE\n",
    ):
        assert line in shown
    write_leaderboard(search, RESULTS)
    assert Config.load(best).optimizer.lr_g == 0.001

    search.save()
    resume = [storage, "--resume=s"]
    other = refusal(*resume, "--study=mssql+pyodbc://me:other@host/more?driver=a")
    public = "study was mssql+pyodbc://host/db?driver=a, now mssql+pyodbc://host/more?driver=a"
    assert public in other
    assert "not stored: give --study with it again" in refusal(*resume)
    again = "mssql+pyodbc://me:new@host/db?driver=a"
    resumed = prepare_search([*resume, f"--study={again}"], "search")
    assert resumed.options.study == again
    resumed.save()
    record = (resumed.folder.read(SEARCH_FILE) or b"").decode()
    assert "study: mssql+pyodbc://host/db?driver=a\n" in record
    for text in (shown, other, record):
        assert "word" not in text
        assert "//me" not in text


def test_the_summary_names_what_can_read_the_study(
    flags: list[str], bucket: Any, tmp_path: Path
) -> None:
    remote = prepare_search([*flags, f"--storage={bucket.uri('runs')}", "--name=other"], "search")
    shown = summary(remote, RESULTS, finished=False)
    assert "tensorboard --logdir s3://bucket/runs/other/trials\n" in shown
    assert "optuna-dashboard" not in shown  # it reads no object store
    study = f"sqlite:///{tmp_path}/s.db"
    saved(flags, tmp_path, f"--study={study}")
    resumed = prepare_search([f"--storage={tmp_path}", "--resume=s"], "search")
    assert resumed.options.study == study
    assert "--study" not in resumed.resume_command("cl-ray tune")
