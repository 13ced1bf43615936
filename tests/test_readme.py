"""Every command and every Python block of README.md and docs/ runs, in order, on a small set.

Commands run as they stand, in an empty folder. Only what makes them long is made short: training
has a small dataset and small networks appended to it, and TensorBoard a port of its own.
"""

import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from helpers.small_run import SMALL_RUN
from PIL import Image

from cl_ray.data.dataset import Dataset

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
def digits(make_digits: Any) -> str:
    """The small data set."""
    return make_digits(200)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Path:
    """An empty folder but for what a user brings: images, and a config."""
    folder = tmp_path_factory.mktemp("user")
    rows = Dataset.open(digits).read("train")
    assert rows.label is not None
    for number, (image, label) in enumerate(zip(rows.image, rows.label, strict=True)):
        file = folder / "path/to/images" / str(label) / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[..., 0]).save(file)
    (folder / "mine.yaml").write_text("epochs: 2\n")
    return folder


MEASURED_LITTLE = [
    "--set=evaluation.reference=mnist",
    "--set=evaluation.samples=60",
    "--set=evaluation.images=60",
]


def run(place: Path, command: str, *shorter: str) -> subprocess.CompletedProcess[str]:
    """Type a command."""
    program, *flags = shlex.split(command)
    assert program == "cl-ray"
    return subprocess.run(
        [sys.executable, "-m", "cl_ray", *flags, *shorter],
        cwd=place,
        capture_output=True,
        text=True,
        timeout=500,
    )


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
def test_commands_do_what_they_say(command: str, place: Path, digits: str) -> None:
    """In the README's order: later ones use the run `runs/demo` of the first."""
    shorter: list[str] = []
    if command.startswith("cl-ray train"):
        shorter = SMALL_RUN if "--data" in command else [f"--data={digits}", *SMALL_RUN]
        shorter = shorter if "--epochs" in command else [*shorter, "--epochs=1"]
    elif command.startswith("cl-ray tune"):
        more = 3 if "--resume" in command else 2
        shorter = [f"--data={digits}", f"--trials={more}", "--epochs=1", *MEASURED_LITTLE]
    done = run(place, command, *shorter)
    if "FashionMNIST" in command and done.returncode == 1:
        assert "cl-ray: " in done.stderr  # where the network does not allow, it says so
        assert "Traceback" not in done.stderr
        return
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for flag, path in pairwise(shlex.split(command)):
        if flag == "--out":
            assert any((place / path).iterdir()), f"{path} is empty"


def serve(place: Path, words: list[str], page: str) -> str:
    """What a program that serves pages answers when asked for one."""
    process = subprocess.Popen(
        words, cwd=place, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout
        found = next(m for line in process.stdout if (m := re.search(r"http://[^\s/]+:\d+", line)))
        deadline = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(f"{found.group()}{page}", timeout=60) as answer:
                    return str(answer.read().decode())
            except urllib.error.URLError:  # some print their address before they listen
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)


def test_tensorboard_finds_the_runs_and_the_trials(place: Path) -> None:
    runs, trials = [c for c in COMMANDS if c.startswith("tensorboard")]
    for command, found in ((runs, "demo/tensorboard"), (trials, "0000/tensorboard")):
        words = [sys.executable, "-m", "tensorboard.main", *shlex.split(command)[1:], "--port=0"]
        assert found in serve(place, words, "/data/runs")


def test_optuna_dashboard_opens_the_study(place: Path) -> None:
    (command,) = [c for c in COMMANDS if c.startswith("optuna-dashboard")]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from optuna_dashboard._cli import main; main()"
    words = [sys.executable, "-c", code, *shlex.split(command)[1:], f"--port={port}"]
    assert '"s1"' in serve(place, words, "/api/studies")


@pytest.mark.parametrize("script", SCRIPTS, ids=range(len(SCRIPTS)))
def test_python_runs_as_shown(script: str, place: Path, digits: str) -> None:
    small = f"data={digits!r}, batch_size=32"
    short = script.replace("Config(", f"Config({small}, ")
    done = subprocess.run(
        [sys.executable, "-c", short], cwd=place, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
