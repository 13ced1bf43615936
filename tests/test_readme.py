"""Every command and every Python block of README.md and docs/ runs, in order, on a small set.

Commands run as they stand, in an empty folder, in this process and on one Ray. Only what makes them
long is made short: a small dataset, small networks and few images are appended to them.
"""

import contextlib
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.datasets import mnist, write_images
from helpers.local_ray import local_ray
from helpers.small_run import SMALL_RUN
from PIL import Image

from cl_ray.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)


def commands(text: str) -> list[str]:
    """Return the commands of the indented blocks, each once."""
    shell = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    lines = [line.strip() for line in shell.splitlines() if line.startswith("    ")]
    return list(dict.fromkeys(c.split(" #")[0].strip() for line in lines for c in line.split("&&")))


COMMANDS = commands(TEXT)
SCRIPTS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
"""Blocks that need the run `runs/demo` run where it is."""
pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    splits: Any = {split: mnist(split, 200) for split in ("train", "test")}
    return write_images(tmp_path_factory.mktemp("digits") / "digits", **splits)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An empty working directory but for what a user brings: images, and a config."""
    folder = tmp_path_factory.mktemp("user")
    for number, (image, label) in enumerate(zip(*mnist("train", 200), strict=True)):
        file = folder / "path/to/images" / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(file)
    (folder / "mine.yaml").write_text("epochs: 2\n")
    before = dict(os.environ)
    with contextlib.chdir(folder), local_ray(cpus=2):
        yield folder
    os.environ.clear()
    os.environ.update(before)


MEASURED_LITTLE = {"reference": "{reference}", "samples": 60, "images": 60}
SHORTER = {
    "train": [
        *SMALL_RUN, *(f"--evaluation.{name}={value}" for name, value in MEASURED_LITTLE.items())
    ],
    "tune": [
        "--data={digits}", "--epochs=1",
        *(f"--set=evaluation.{name}={value}" for name, value in MEASURED_LITTLE.items()),
    ],
    "evaluate": [f"--{name}={value}" for name, value in MEASURED_LITTLE.items()],
}  # fmt: skip
"""What is appended to each command."""


def shorten(command: str, digits: str) -> list[str]:
    """Return the words after `cl-ray`, and what makes the command short."""
    program, name, *flags = shlex.split(command)
    assert program == "cl-ray"
    more = list(SHORTER.get(name, []))
    if name == "train":
        more += ["--data={digits}"] * ("--data" not in flags)
        more += ["--epochs=1"] * ("--epochs" not in flags)
    elif name == "tune":
        more += ["--trials=3" if "--resume" in flags else "--trials=2"]
    elif "mnist" in flags:
        more += ["--around={digits}" if name == "generate" else "--data={digits}"]
    elif name == "generate":
        more += ["--count=60"]
    reference = "none" if "photos" in command else "mnist"  # whose images have another shape
    return [name, *flags, *(flag.format(digits=digits, reference=reference) for flag in more)]


def test_the_two_commands_and_the_pictures_are_there() -> None:
    for target, recipe in {"train": "cl-ray train --preset quick", "test": "pytest"}.items():
        assert f"make {target}" in COMMANDS
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
        assert recipe in done.stdout, done.stderr
    for page in PAGES:
        text = page.read_text()
        for link in re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'<img src="([^"]+)"', text):
            assert link.startswith("https://") or (page.parent / link).exists(), (page, link)


RUN = [
    pytest.param(c, marks=() if c in commands(README) else pytest.mark.slow)
    for c in COMMANDS
    if c.startswith("cl-ray") and not re.search(r"\b[A-Z]{3,}$", c)
]
"""Those that name no placeholder; the commands of docs/ are variants of the README's."""


@pytest.mark.parametrize("command", RUN)
def test_commands_do_what_they_say(
    command: str, place: Path, digits: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """In the README's order: later ones use the run `runs/demo` of the first."""
    try:
        main(shorten(command, digits))
    except SystemExit:
        error = capsys.readouterr().err
        assert "FashionMNIST" in command, error
        assert error.startswith("cl-ray: ")  # where the network does not allow it, it says so
        return
    for flag, path in pairwise(shlex.split(command)):
        if flag == "--out":
            assert any((place / path).iterdir()), f"{path} is empty"


def wait_for_page(place: Path, words: list[str], page: str, wanted: str) -> None:
    """Start a program that serves pages and ask for one until a text is in its answer."""
    process = subprocess.Popen(
        words, cwd=place, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        found = next(m for line in process.stdout if (m := re.search(r"http://[^\s/]+:\d+", line)))
        deadline, text = time.monotonic() + 300, ""
        while wanted not in text:
            assert time.monotonic() < deadline, text
            time.sleep(0.5)
            # Some print their address before they listen, and listen before they have read all.
            with (
                contextlib.suppress(OSError),
                urllib.request.urlopen(f"{found.group()}{page}", timeout=60) as answer,
            ):
                text = answer.read().decode()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=300)


def test_tensorboard_finds_the_runs_and_the_trials(place: Path) -> None:
    runs, trials = [c for c in COMMANDS if c.startswith("tensorboard")]
    for command, found in ((runs, "demo/tensorboard"), (trials, "0000/tensorboard")):
        words = [sys.executable, "-m", "tensorboard.main", *shlex.split(command)[1:], "--port=0"]
        wait_for_page(place, words, "/data/runs", found)


def test_optuna_dashboard_opens_the_study(place: Path) -> None:
    (command,) = [c for c in COMMANDS if c.startswith("optuna-dashboard")]
    port = random.randint(20000, 30000)  # of no range from which the system or Ray takes ports
    code = "from optuna_dashboard._cli import main; main()"
    words = [sys.executable, "-c", code, *shlex.split(command)[1:], f"--port={port}"]
    wait_for_page(place, words, "/api/studies", '"s1"')


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_python_runs_as_shown(script: str, place: Path, digits: str) -> None:
    small = f"data={digits!r}, batch_size=32"
    exec(re.sub(r"\bConfig\(", f"Config({small}, ", script), {})
