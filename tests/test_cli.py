"""The `cl-ray` program and the package: help, mistakes, data, and the first run on it."""

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
from helpers import datasets
from helpers.run_folder import build_trainer, save_run
from helpers.small_run import SMALL_RUN
from PIL import Image
from pydantic_core import PydanticUndefined
from rich.console import Console

import cl_ray
from cl_ray import cli
from cl_ray.base_config import BaseConfig
from cl_ray.commands import train as train_command
from cl_ray.commands.data import DatasetProgress, print_dataset_summary
from cl_ray.commands.train import TrainCommand, base_config
from cl_ray.config import Config, preset
from cl_ray.data.config import PHOTO_VIEWS, ViewConfig
from cl_ray.data.dataset import Dataset
from cl_ray.data.source_config import SourceConfig
from cl_ray.errors import UserError
from cl_ray.tuning.options import SearchOptions

SIDE = 32
KINDS: dict[str, type[BaseConfig]] = {
    "train": TrainCommand,
    "data": SourceConfig,
    "tune": SearchOptions,
}
"""Classes of flags; each other command has one in its module, such as `ReportCommand`."""


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """Restore the environment, in which a command sets variables for Ray."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def run(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    """Run `cl-ray` in this process; return its output, or its error if it exits with a code."""
    status = None
    try:
        cli.main(arguments)
    except SystemExit as error:
        status = error.code
    assert (status or 0) == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def write_images(folder: Path, classes: dict[str, int], mode: str) -> str:
    """Write a folder of noisy PNGs, one subfolder a class; each class has its brightness."""
    random = np.random.default_rng(0)
    shape = (SIDE, SIDE) if mode == "L" else (SIDE, SIDE, 3)
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            pixels = random.integers(80 * number, 80 * number + 90, shape, np.uint8)
            Image.fromarray(pixels, mode).save(folder / name / f"{image}.png")
    return str(folder)


def flags_of(kind: type[BaseConfig], prefix: str = "--") -> Iterator[tuple[str, Any]]:
    """Yield the flag and the field of every setting."""
    for name, field in kind.model_fields.items():
        renamed = {"label": "class"}.get(name, name)  # no field can be called `class`
        flag, part = prefix + renamed.replace("_", "-"), field.annotation
        if isinstance(part, type) and issubclass(part, BaseConfig):
            yield from flags_of(part, f"{flag}.")
        else:
            yield flag, field


@pytest.mark.parametrize("arguments", [[], ["-h"], ["--help"]])
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    usage = run(capsys, *arguments)
    for command in cli.COMMANDS:
        assert re.search(rf"^  {command} +\w", usage, re.MULTILINE)


def test_script_and_module_are_the_same() -> None:
    script = Path(sys.executable).parent / "cl-ray"
    for command in ([sys.executable, "-m", "cl_ray"], [str(script)]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout == f"{cli.usage()}\n"


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_lists_every_field_with_description_and_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    monkeypatch.setenv("COLUMNS", "90")  # wider, tyro's boxes stand side by side
    monkeypatch.setattr(train_command, "default_preset", lambda *_: "quick")
    module = import_module(f"cl_ray.commands.{command}")
    kind = KINDS.get(command) or getattr(module, f"{command.capitalize()}Command")
    shown = run(capsys, command, "--help")
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())
    for flag, field in flags_of(kind):
        assert re.search(rf" {re.escape(flag)}[ ,]| {flag[2:].upper()} ", text), flag
        assert field.description, flag
        description = " ".join(field.description.split())
        assert description in text, flag
        if command in ("train", "data"):
            default = field.default
            words = "required" if default is PydanticUndefined else f"default: {default}"
            assert f"{description} ({words})" in text, flag


def test_help_of_train_starts_with_what_users_set_first(capsys: pytest.CaptureFixture[str]) -> None:
    flags = re.findall(r"^\W+ (--[\w.-]+)", run(capsys, "train", "--help"), re.MULTILINE)
    assert flags[:4] == ["--preset", "--name", "--data", "--storage"]


FLAG_MISTAKES = [
    ("data --source x --out y --size 4", "size 4 is refused: input should be greater than or"),
    ("train --optimizer.lr-d=-0.1", "optimizer.lr_d -0.1 is refused: "),
    ("train --name ..", "name '..' must be one plain folder name: any characters but spaces"),
    ("train --storage= --name=a", "storage is empty"),
    ("train --data=", "data is empty"),
    ("data --source= --out=x", "source is empty"),
    ("data --source=x --out=", "out is empty"),
    ("evaluate run --data=", "data is empty"),
    ("evaluate ''", "run is empty"),
    ("generate run --out=x --around=", "around is empty"),
    ("embed run --out=x --data=", "data is empty"),
    ("score run --out=x --data=", "data is empty"),
]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        *((command, f"In the flags: {message}") for command, message in FLAG_MISTAKES),
        ("trian", f"There is no command 'trian'; there are: {', '.join(cli.COMMANDS)}."),
        ("data --source=. --out=mnist", "mnist names the packaged dataset"),
        (
            "train --name=a --storage=ftp://machine/runs",
            "ftp://machine/runs/a cannot be opened: ",
        ),
        (
            "train --preset=slow",
            "preset 'slow' is unknown; there are: quick, mnist, photos-64, photos-128, photos-256.",
        ),
        (
            "train --name=old --storage=.",
            "{storage}/old/config.yaml is not the config of a run: it has no field 'name'; ",
        ),
    ],
)
def test_mistakes_are_named_in_one_line(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    message: str,
) -> None:
    storage = tmp_path / "storage"
    (storage / "old").mkdir(parents=True)
    for folder in (storage / "old", storage, tmp_path):  # which could be taken for runs
        (folder / "config.yaml").write_text("preset: mnist\n")
    monkeypatch.chdir(storage)
    before = sorted(tmp_path.rglob("*"))
    error = run(capsys, *shlex.split(command), code=1)
    assert error.startswith(f"cl-ray: {message.format(storage=storage)}")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_unknown_and_missing_flags(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--epoch-s" in run(capsys, "train", "--epoch-s", "3", code=2)
    assert "--source" in run(capsys, "data", "--out", "x", code=2)


def test_cluster_that_cannot_be_reached(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["train", "--address=nonsense", f"--storage={tmp_path}", "--name=a"]
    assert run(capsys, *arguments, code=1) == (
        "cl-ray: Cannot join the Ray cluster nonsense: give HOST:PORT of its head's GCS "
        "(HOST:6379), or auto for one on this machine.\n"
    )
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]


def test_presets_of_file_and_flag(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: mnist\nseed: 5\n")
    base = base_config([f"--config={file}"])
    assert (base.preset, base.seed, base.epochs) == ("mnist", 5, preset("mnist").epochs)
    assert base.epochs != Config().epochs
    with pytest.raises(UserError, match="has the preset mnist and the flag has quick"):
        base_config([f"--config={file}", "--preset", "quick"])
    file.write_text("seed: 5\n")
    assert base_config([f"--config={file}", "--preset=mnist"]).epochs == base.epochs


def test_existing_run_gives_the_config(tmp_path: Path) -> None:
    (tmp_path / "demo").mkdir()
    config = Config(name="demo", seed=9, storage="elsewhere")
    (tmp_path / "demo" / "config.yaml").write_text(config.to_yaml())
    flags = [f"--storage={tmp_path}", "--name=demo"]
    base = base_config(flags)
    assert (base.seed, base.storage) == (9, str(tmp_path))
    with pytest.raises(UserError, match="The run demo has the preset quick, not mnist"):
        base_config([*flags, "--preset=mnist"])
    file = tmp_path / "mine.yaml"  # which names the run, or another one
    file.write_text(f"name: demo\nstorage: {tmp_path}\nepochs: 5\n")
    base = base_config([f"--config={file}"])
    assert (base.seed, base.epochs) == (9, 5)
    file.write_text("storage: nowhere\n")
    assert base_config([f"--config={file}", "--name=demo"]).seed == 0


def test_run_without_a_final_summary_is_not_finished(tmp_path: Path, make_digits: Any) -> None:
    """A run with its last checkpoint and no summary is resumed."""
    trainer = build_trainer(make_digits(40), epochs=1, name="demo", storage=str(tmp_path))
    folder = save_run(trainer, tmp_path, step=4)
    config, summary = Config.load(folder / "config.yaml"), folder / "summary.json"
    unreachable = cl_ray.LaunchOptions(address="nonsense")
    for unfinished in (None, {"status": "diverged"}, {"status": "finished", "steps": 3}):
        if unfinished:
            summary.write_text(json.dumps(unfinished))
        with pytest.raises(UserError, match="Cannot join"):
            cl_ray.train(config, unreachable)
    finished = {"status": "finished", "epochs": 1, "steps": 4}
    summary.write_text(json.dumps(finished))
    result = cl_ray.train(config, unreachable)
    assert result.folder == str(tmp_path / "demo")
    assert result.summary == finished
    with pytest.raises(UserError, match="Cannot join"):
        cl_ray.train(config.model_copy(update={"epochs": 2}), unreachable)


LIGHT_IMPORTS = """
import sys
import cl_ray

def heavy():
    return [name for name in ("torch", "ray", "torchvision") if name in sys.modules]

assert heavy() == [], heavy()
from cl_ray import Config, UserError, preset
assert Config().preset == "quick"
from cl_ray.cli import main
main(["--help"])
try:
    main(["train", "--help"])
except SystemExit:
    pass
assert heavy() == [], heavy()
from cl_ray import LaunchOptions, train
assert callable(train) and LaunchOptions().address is None
"""


def test_import_and_help_are_light() -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT_IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_public_names() -> None:
    from cl_ray.gan import ContrastiveGAN
    from cl_ray.training.launch import train

    assert set(cl_ray.__all__) == set(cl_ray._MODULES) <= set(dir(cl_ray))
    for name in cl_ray.__all__:
        assert getattr(cl_ray, name).__name__ == name
    assert (cl_ray.ContrastiveGAN, cl_ray.train) == (ContrastiveGAN, train)
    with pytest.raises(AttributeError, match="'cl_ray' has no attribute 'trian'"):
        cl_ray.trian  # noqa: B018


def test_data_prints_a_summary(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = write_images(tmp_path / "my images", {"cat": 30, "dog": 20}, "L")
    flags = [f"--source={source}", "--out=data/my pets", "--test-fraction=0.2", "--licence=CC0"]
    printed = run(capsys, "data", *flags)
    info = Dataset.open("data/my pets").info
    assert (info.shape, info.classes) == ((SIDE, SIDE, 1), ["cat", "dog"])
    size = {name: split.shards[0].bytes / 1000 for name, split in info.splits.items()}
    assert printed.splitlines() == [
        "reading train: 50 images",
        "writing train: 40 images",
        "writing test: 10 images",
        "dataset   my pets",
        f"source    {source}",
        "licence   CC0",
        "images    32 × 32, grey",
        "encoding  raw pixels",
        "classes   2: cat, dog",
        f"train     40 images in 1 file, {size['train']:.1f} kB",
        f"test      10 images in 1 file, {size['test']:.1f} kB",
        f"where     {tmp_path}/data/my pets",
        "next      cl-ray train --data 'data/my pets'",
    ]


def test_data_shows_progress_in_a_terminal() -> None:
    output = io.StringIO()
    terminal = Console(file=output, force_terminal=True, width=100, legacy_windows=False)
    with DatasetProgress(terminal) as progress:
        progress.report("reading train", 1000, None)
        progress.refresh()
        progress.report("reading train", 2000, 2000)
        progress.report("writing train", 1500, 2000)
        progress.refresh()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())
    assert re.search(r"reading train .* 1,000 images", shown)
    assert re.search(r"reading train .* 2,000 images\s+writing train .* 1,500 images", shown)


@pytest.mark.parametrize(
    ("changes", "classes"),
    [
        ({"labelled": False, "classes": None}, "none"),
        ({"classes": None}, "by number, without names"),
        ({"classes": [f"class{n}" for n in range(12)]}, "12: class0, .*, class9, …"),
    ],
)
def test_data_without_labels_or_names(changes: dict[str, Any], classes: str) -> None:
    console = Console(width=40)
    with console.capture() as printed:
        print_dataset_summary(Dataset.open("mnist").info.model_copy(update=changes), "x", console)
    lines = printed.get().splitlines()
    assert re.fullmatch(f"classes +{classes}", lines[5])
    assert "train      55,000 images in 4 files, 8.3 MB" in lines


def test_interrupted_data_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cl_ray", "data", "--source=mnist", f"--out={tmp_path}/copy"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("reading train: ")
        process.send_signal(signal.SIGINT)
        _, error = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130
    assert error == "cl-ray: stopped; no dataset was written.\n"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.ray
def test_images_become_data_and_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Colour images in classes, of the smallest size and encoded.

    The second command is the one that the first one prints.
    """
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "images", {"a": 25, "b": 24}, "RGB")
    flags = ("--size=16", "--encoding=png")
    printed = run(capsys, "data", "--source", "images", "--out", "data/mine", *flags)
    assert "images    16 × 16, colour\nencoding  PNG, lossless\n" in printed
    program, *command = shlex.split(printed.splitlines()[-1].removeprefix("next"))
    assert program == "cl-ray"
    small = ("--name=mine", "--pairs.mode=labels", "--epochs=1", *SMALL_RUN)
    assert "trained" in run(capsys, *command, *small)
    folder = tmp_path / "runs" / "mine"
    config = Config.load(folder / "config.yaml")
    assert config.data == f"{tmp_path}/data/mine"  # the same in any working directory
    weights = safetensors.torch.load_file(folder / "generator.safetensors")
    assert any(3 in tensor.shape for tensor in weights.values())
    with Image.open(folder / "samples" / "samples-0001.png") as image:
        assert np.ptp(np.asarray(image), axis=(0, 1)).max() > 0


def test_the_default_preset_follows_the_size_of_the_images(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for side, expected in ((128, "photos-128"), (60, "photos-64"), (32, cli.default_preset(None))):
        pixels = random.integers(0, 256, (4, side, side, 3), np.uint8)
        data = datasets.write_images(tmp_path / str(side), train=(pixels, [None] * 4))
        config = base_config([f"--data={data}"])
        assert config.preset == expected
        assert (f"The preset is {expected}" in capsys.readouterr().out) == (side >= 48)
        assert base_config(["--preset=quick", f"--data={data}"]).preset == "quick"
        file = tmp_path / "data.yaml"
        file.write_text(f"data: {data}\n")
        assert base_config([f"--config={file}"]).preset == expected
        capsys.readouterr()
        file.write_text(f"data: {data}\npreset: mnist\n")
        assert base_config([f"--config={file}"]).preset == "mnist"
        assert "The preset is" not in capsys.readouterr().out


def test_few_images_have_epochs_for_enough_steps_unless_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (200, 28, 28, 1), np.uint8)
    data = datasets.write_images(tmp_path / "few", train=(pixels, [None] * 200))

    def epochs(*flags: str) -> tuple[int, int]:
        config = base_config([f"--data={data}", "--preset=quick", *flags])
        return config.epochs, config.epoch_repeats

    assert epochs() == (11, 25)  # 275 passes of 3.1 steps
    said = "The run has 11 epochs of 25 passes over them, as there are 200 training images; --ep"
    assert said in capsys.readouterr().out
    file = tmp_path / "file.yaml"
    for text, expected in {
        "epochs: 3\n": (3, 1),
        "epoch_repeats: 9\n": (1, 9),
        "batch_size: 100\n": (10, 40),
        "batch_size: 4\n": (16, 1),
        "epochs: 20\nbatch_size: 3\n": (20, 1),
    }.items():
        file.write_text(text)
        assert epochs(f"--config={file}") == expected
    capsys.readouterr()
    for flag in ("--batch-size=100", "--batch_size=100"):
        assert epochs(flag) == (10, 40)
    capsys.readouterr()
    for flag in ("--epochs=2", "--epoch-repeats=2", "--epoch_repeats=2"):
        assert epochs(flag) == (1, 1)  # of the preset, before the flag
    assert not capsys.readouterr().out
    recorded = Config(name="old", data=data, storage=str(tmp_path))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(recorded.to_yaml())
    assert epochs(f"--storage={tmp_path}", "--name=old") == (1, 1)


def test_photographs_have_views_of_their_own_unless_set(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    random = np.random.default_rng(0)
    for channels in (1, 3):
        pixels = random.integers(0, 256, (4, 28, 28, channels), np.uint8)
        datasets.write_images(tmp_path / str(channels), train=(pixels, [None] * 4))
    grey, colour = (f"--data={tmp_path}/{channels}" for channels in (1, 3))
    said = "The views are those of photographs, as the images are in colour"
    for flags, views in (
        ([], ViewConfig()),
        ([grey], ViewConfig()),
        ([colour], PHOTO_VIEWS),
        (["--preset=quick", colour], PHOTO_VIEWS),
    ):
        assert base_config(flags).views == views
        assert (said in capsys.readouterr().out) == (views == PHOTO_VIEWS)

    def views_of_file(text: str) -> ViewConfig:
        (tmp_path / "file.yaml").write_text(text)
        return base_config([f"--config={tmp_path}/file.yaml"]).views

    in_file = f"data: {tmp_path}/3\npreset: mnist\n"
    assert views_of_file(in_file) == PHOTO_VIEWS
    unflipped = PHOTO_VIEWS.model_copy(update={"flip": 0.0})
    assert views_of_file(f"{in_file}views: {{flip: 0}}") == unflipped
    assert said in capsys.readouterr().out
    # A run's config.yaml names all fields, and trains the same run.
    recorded = Config(name="old", data=f"{tmp_path}/3", storage=str(tmp_path))
    assert views_of_file(recorded.to_yaml()) == ViewConfig()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.yaml").write_text(recorded.to_yaml())
    assert base_config([f"--storage={tmp_path}", "--name=old", colour]).views == ViewConfig()
    assert said not in capsys.readouterr().out
