"""The command and the package, as they are met: help, mistakes, data, and the first run on it."""

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
from PIL import Image
from pyarrow.fs import LocalFileSystem
from pydantic_core import PydanticUndefined
from rich.console import Console

import cl_ray
from cl_ray import cli
from cl_ray.base_config import BaseConfig
from cl_ray.checkpoint import CheckpointStore
from cl_ray.commands import train as train_command
from cl_ray.commands.train import TrainCommand, base_config
from cl_ray.config import Config, build_config, preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.commands.data import DatasetProgress, print_dataset_summary
from cl_ray.data.sources import SourceConfig
from cl_ray.errors import UserError
from cl_ray.trainer import Trainer

SIDE = 32
SMALL = [
    "--batch-size=16",
    "--generator.width=4",
    "--generator.latent=8",
    "--discriminator.width=4",
    "--discriminator.hidden=16",
    "--epochs=1",
]


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """What a command sets for its Ray ends with the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int | None = None) -> str:
    """What `cl-ray` prints; with a code, what it complains of when it ends with that."""
    if code is None:
        cli.main(arguments)
    else:
        with pytest.raises(SystemExit) as ended:
            cli.main(arguments)
        assert ended.value.code == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def pictures(folder: Path, classes: dict[str, int], mode: str) -> str:
    """A folder of noisy PNGs, one subfolder a class; each class has its brightness."""
    random = np.random.default_rng(0)
    shape = (SIDE, SIDE) if mode == "L" else (SIDE, SIDE, 3)
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for image in range(count):
            pixels = random.integers(80 * number, 80 * number + 90, shape, np.uint8)
            Image.fromarray(pixels, mode).save(folder / name / f"{image}.png")
    return str(folder)


def leaves(kind: type[BaseConfig], prefix: str = "--") -> list[tuple[str, Any]]:
    """The flag and the field of every setting."""
    found: list[tuple[str, Any]] = []
    for name, field in kind.model_fields.items():
        flag = prefix + name.replace("_", "-")
        part = field.annotation
        if isinstance(part, type) and issubclass(part, BaseConfig):
            found += leaves(part, f"{flag}.")
        else:
            found.append((flag, field))
    return found


@pytest.mark.parametrize("command", [[], ["-h"], ["--help"]])
def test_usage(capsys: pytest.CaptureFixture[str], command: list[str]) -> None:
    usage = said(capsys, *command)
    for verb in cli.COMMANDS:
        assert re.search(rf"^  {verb} +\w", usage, re.MULTILINE)


def test_the_script_and_the_module_are_one() -> None:
    script = Path(sys.executable).parent / "cl-ray"
    for command in ([sys.executable, "-m", "cl_ray"], [str(script)]):
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert done.stdout == f"{cli.usage()}\n"


@pytest.mark.parametrize(
    ("verb", "kind"), [("train", TrainCommand), ("data", SourceConfig)], ids=["train", "data"]
)
def test_help_lists_every_field_with_its_help_and_default(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    verb: str,
    kind: type[BaseConfig],
) -> None:
    monkeypatch.setenv("COLUMNS", "90")  # wider, its boxes stand side by side
    monkeypatch.setattr(train_command, "default_preset", lambda: "quick")
    shown = said(capsys, verb, "--help", code=0)
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())
    flags = leaves(kind)
    assert len(flags) >= 11
    for flag, field in flags:
        assert re.search(rf" {re.escape(flag)}[ ,]", text), flag
        assert field.description, flag
        start = text.index(" ".join(field.description.split()))
        end = text[start:].partition(field.description)[2]
        default = "required" if field.default is PydanticUndefined else f"default: {field.default}"
        assert end.startswith(f" ({default})"), (flag, end[:60])


@pytest.mark.parametrize("verb", [v for v in cli.COMMANDS if v not in ("train", "data")])
def test_help_of_the_other_verbs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setenv("COLUMNS", "90")
    shown = said(capsys, verb, "--help", code=0)
    text = " ".join(re.sub("[│╭╮╰╯─]", " ", shown).split())
    kind = getattr(import_module(f"cl_ray.commands.{verb}"), f"{verb.capitalize()}Command")
    for name, field in kind.model_fields.items():
        flag = {"label": "class"}.get(name, name).replace("_", "-")  # which no field can be called
        assert re.search(rf" --{flag}[ ,]| {name.upper()} ", text), name
        assert field.description, name
        assert " ".join(field.description.split()) in text, name


def test_mistakes_on_the_command_line_are_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = said(capsys, "trian", code=1)
    assert message == (
        f"cl-ray: There is no command 'trian'; there are: {', '.join(cli.COMMANDS)}.\n"
    )
    assert "--epoch-s" in said(capsys, "train", "--epoch-s", "3", code=2)
    assert "--source" in said(capsys, "data", "--out", "x", code=2)
    message = said(capsys, "data", "--source", "x", "--out", "y", "--size", "4", code=1)
    assert message == (
        "cl-ray: In the flags: size 4 is refused: input should be greater than or equal to 28.\n"
    )
    message = said(capsys, "train", "--optimizer.lr-d=-0.1", code=1)
    assert message.startswith("cl-ray: In the flags: optimizer.lr_d -0.1 is refused: ")
    assert said(capsys, "data", f"--source={tmp_path}", "--out=mnist", code=1).count("\n") == 1
    message = said(capsys, "train", "--name=a", "--storage=ftp://me:pass@machine/runs", code=1)
    assert message.startswith("cl-ray: In --storage: ftp://machine/runs/a cannot be opened: ")
    assert message.count("\n") == 1


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("train --name ..", "name '..' must be one plain folder name: any characters but spaces"),
        ("train --name=.", "name '.' must be one plain folder name"),
        ("train --storage= --name=a", "storage is empty"),
        ("train --data=", "data is empty"),
        ("data --source= --out=x", "source is empty"),
        ("data --source=x --out=", "out is empty"),
        ("evaluate run --data=", "data is empty"),
        ("evaluate ''", "run is empty"),
        ("generate run --out=x --around=", "around is empty"),
        ("embed run --out=x --data=", "data is empty"),
    ],
)
def test_what_names_nothing_is_refused(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: str,
) -> None:
    place = tmp_path / "storage"
    (place / "runs").mkdir(parents=True)
    for folder in (place, tmp_path):  # which another reading would take for a run
        (folder / "config.yaml").write_text("preset: mnist\n")
    monkeypatch.chdir(place)
    before = sorted(tmp_path.rglob("*"))
    message = said(capsys, *shlex.split(command), code=1)
    assert message.startswith(f"cl-ray: In the flags: {words}")
    assert message.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_a_cluster_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    message = said(
        capsys, "train", "--address=nonsense", f"--storage={tmp_path}", "--name=a", code=1
    )
    assert message == (
        "cl-ray: There is no joining the Ray cluster nonsense: Invalid address format: nonsense.\n"
    )
    assert [p.name for p in (tmp_path / "a").iterdir()] == [".lock"]


def test_a_file_of_another_preset_starts_from_that_preset(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("preset: mnist\nseed: 5\n")
    start = base_config([f"--config={file}"])
    assert (start.preset, start.seed, start.epochs) == ("mnist", 5, preset("mnist").epochs)
    assert start.epochs != Config().epochs
    with pytest.raises(UserError, match="says preset mnist and the flag says quick"):
        base_config([f"--config={file}", "--preset", "quick"])
    file.write_text("seed: 5\n")
    assert base_config([f"--config={file}", "--preset=mnist"]).epochs == start.epochs


def test_a_run_whose_end_was_cut_short_is_not_finished(tmp_path: Path, make_digits: Any) -> None:
    """Its last checkpoint is there, its summary is not: it goes on, to its end at least."""
    fields = {
        "generator": {"width": 4}, "discriminator": {"width": 4}, "epochs": 2, "batch_size": 32,
        "data": make_digits(40), "name": "demo", "storage": str(tmp_path),
    }  # fmt: skip
    config = build_config(fields)
    run = Trainer(config, InMemoryLoader.read(Partition(Dataset.open(config.data), config)))
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo" / "config.yaml").write_text(config.to_yaml())
    CheckpointStore(LocalFileSystem(), str(tmp_path / "demo")).save(
        run.state_dict(), epoch=2, step=4, metric=None
    )
    joins = cl_ray.Launch(address="nonsense")
    summary = tmp_path / "demo" / "summary.json"
    with pytest.raises(UserError, match="no joining"):
        cl_ray.train(config, joins)
    for unfinished in ({"status": "diverged"}, {"status": "finished", "epochs": 1}):
        summary.write_text(json.dumps(unfinished))
        with pytest.raises(UserError, match="no joining"):
            cl_ray.train(config, joins)
    summary.write_text(json.dumps({"status": "finished", "epochs": 2}))
    trained = cl_ray.train(config, joins)
    assert trained.folder == str(tmp_path / "demo")
    assert trained.summary == {"status": "finished", "epochs": 2}
    with pytest.raises(UserError, match="no joining"):
        cl_ray.train(config.model_copy(update={"epochs": 3}), joins)


LAZY = """
import sys
import cl_ray

def heavy():
    return [name for name in ("torch", "ray", "torchvision") if name in sys.modules]

assert heavy() == [], heavy()
from cl_ray import Config, Launch, UserError, preset, train
assert callable(train) and Config().preset == "quick" and Launch().address is None
assert heavy() == [], heavy()
from cl_ray.cli import main
main(["--help"])
try:
    main(["train", "--help"])
except SystemExit:
    pass
assert heavy() == [], heavy()
"""


def test_importing_and_asking_for_help_is_light() -> None:
    done = subprocess.run([sys.executable, "-c", LAZY], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there() -> None:
    from cl_ray.gan import ContrastiveGAN
    from cl_ray.training.launch import LaunchOptions, train

    assert set(cl_ray.__all__) == set(cl_ray._HOMES) <= set(dir(cl_ray))
    for name in cl_ray.__all__:
        assert getattr(cl_ray, name).__name__ == name
    assert (cl_ray.Adversary, cl_ray.Launch, cl_ray.train) == (ContrastiveGAN, LaunchOptions, train)
    with pytest.raises(AttributeError, match="'cl_ray' has no attribute 'trian'"):
        cl_ray.trian  # noqa: B018
    with pytest.raises(ImportError):
        from cl_ray import trian  # noqa: F401


def test_data_says_what_it_wrote(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = pictures(tmp_path / "my images", {"cat": 30, "dog": 20}, "L")
    printed = said(
        capsys, "data", f"--source={source}", "--out=data/my pets", "--test-fraction=0.2",
        "--licence=CC0",
    )  # fmt: skip
    info = Dataset.open("data/my pets").info
    assert (info.shape, info.classes) == ((SIDE, SIDE, 1), ["cat", "dog"])
    bytes_ = {name: split.shards[0].bytes / 1000 for name, split in info.splits.items()}
    assert printed.splitlines() == [
        "reading train: 50 images",
        "writing train: 40 images",
        "writing test: 10 images",
        "dataset   my pets",
        f"source    {source}",
        "licence   CC0",
        "images    32 × 32, grey",
        "classes   2: cat, dog",
        f"train     40 images in 1 file, {bytes_['train']:.1f} kB",
        f"test      10 images in 1 file, {bytes_['test']:.1f} kB",
        f"where     {tmp_path}/data/my pets",
        "next      cl-ray train --data 'data/my pets'",
    ]


def test_data_shows_how_far_it_is_in_a_terminal() -> None:
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100, legacy_windows=False)
    with DatasetProgress(terminal) as stages:
        stages.report("reading train", 1000, None)
        stages.bars.refresh()
        stages.report("reading train", 2000, 2000)
        stages.report("writing train", 1500, 2000)
        stages.bars.refresh()
    assert isinstance(terminal.file, io.StringIO)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.file.getvalue())
    assert re.search(r"reading train .* 1,000 images", shown)
    assert re.search(r"reading train .* 2,000 images\s+writing train .* 1,500 images", shown)


def test_data_without_labels_or_names() -> None:
    packaged = Dataset.open("mnist").info
    for changes, classes in (
        ({"labelled": False, "classes": None}, "none"),
        ({"classes": None}, "by number, without names"),
        ({"classes": [f"class{n}" for n in range(12)]}, "12: class0, .*, class9, …"),
    ):
        console = Console(file=io.StringIO(), width=40)
        print_dataset_summary(packaged.model_copy(update=changes), "data/x", console)
        assert isinstance(console.file, io.StringIO)
        lines = console.file.getvalue().splitlines()
        assert re.fullmatch(f"classes   {classes}", lines[4])
        assert "train     60,000 images in 4 files, 9.0 MB" in lines


def test_interrupted_data_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "cl_ray", "data", "--source=mnist", f"--out={tmp_path}/copy"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "reading train: 60,000 images\n"
        process.send_signal(signal.SIGINT)
        _, complaint = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert complaint == "cl-ray: stopped; no dataset was written.\n"
    assert list(tmp_path.iterdir()) == []


def test_images_become_data_and_a_run(tmp_path: Path) -> None:
    """Colour, in classes; the second command is the one that the first one prints."""
    pictures(tmp_path / "images", {"a": 25, "b": 24}, "RGB")

    def run(*command: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "cl_ray", *command],
            capture_output=True, text=True, cwd=tmp_path, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = run("data", "--source", "images", "--out", "data/mine")
    assert "images    32 × 32, colour" in printed
    program, *command = shlex.split(printed.splitlines()[-1].removeprefix("next"))
    assert program == "cl-ray"
    printed = run(*command, "--name=mine", "--pairs.mode=labels", *SMALL)
    assert "trained" in printed
    folder = tmp_path / "runs" / "mine"
    config = Config.load(folder / "config.yaml")
    assert config.data == f"{tmp_path}/data/mine"  # the same in any working folder
    weights = safetensors.torch.load_file(folder / "generator.safetensors")
    assert any(3 in tensor.shape for tensor in weights.values())
    with Image.open(folder / "samples" / "samples-0001.png") as image:
        assert max(high - low for low, high in image.getextrema()) > 0
