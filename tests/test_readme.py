"""What the README says can be typed: each command is taken by the program that it names."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from cl_ray.cli import TrainCommand, parse
from cl_ray.data.sources import SourceConfig

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SHELL = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
INDENTED = [line.strip() for line in SHELL.splitlines() if line.startswith("    ")]
COMMANDS = [part.split(" #")[0].strip() for line in INDENTED for part in line.split("&&")]
SCRIPTS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
KINDS = {"train": TrainCommand, "data": SourceConfig}


def test_the_readme_gives_the_two_commands_and_pictures_that_are_there() -> None:
    assert "make train" in COMMANDS
    assert "make test" in COMMANDS
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("cl-ray")])
def test_flags_are_taken(command: str) -> None:
    _, verb, *flags = shlex.split(command)
    assert parse(KINDS[verb], flags, prog=f"cl-ray {verb}")


@pytest.mark.parametrize("command", [c for c in COMMANDS if not c.startswith("cl-ray")])
def test_other_programs_know_the_command(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "make":
        done = subprocess.run(["make", "-n", *arguments], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        assert program == "tensorboard"
        assert arguments[0] == "--logdir"


def test_the_method_trains_as_shown(tmp_path: Path) -> None:
    (script,) = [s for s in SCRIPTS if "adversary.step" in s]
    shortened = script + "    break\nimport math\nassert math.isfinite(terms['g/adversarial'])\n"
    done = subprocess.run(
        [sys.executable, "-c", shortened], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
