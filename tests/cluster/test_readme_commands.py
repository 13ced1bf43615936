"""The commands of cluster/README.md are accepted by the programs that they call."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from ray.scripts.scripts import cli as ray

from cl_ray.cli import parse_flags
from cl_ray.commands.doctor import DoctorCommand
from cl_ray.commands.train import TrainCommand
from cl_ray.tuning.options import SearchOptions

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "cluster" / "README.md").read_text()
MAIN = (ROOT / "README.md").read_text().partition("## On a cluster\n")[2].partition("\n## ")[0]
COMMANDS = [
    part
    for text in (README, MAIN)
    for line in re.findall(r"^    (\S.*)$", text, re.MULTILINE)
    for part in line.split(" && ")
]
JOBS = [command.partition(" -- ")[2] for command in COMMANDS if " -- " in command]
NOT_INSTALLED = {"aws", "az", "docker", "gcloud", "helm", "kubectl"}
"""Programs that are not here; of their commands only the shell syntax is checked."""


def test_main_readme_has_the_same_commands() -> None:
    lines = re.findall(r"^    (\S.*)$", MAIN, re.MULTILINE)
    assert lines
    for command in (part for line in lines for part in line.split(" && ")):
        known = command.replace("-- python", "--submission-id first -- python")
        assert command in README or known in README, command


def test_links_and_files_exist() -> None:
    for link in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / "cluster" / link).exists(), link
    for anchor in re.findall(r"\]\(#([^)]+)\)", README):
        titles = [t.lower().replace(" ", "-") for t in re.findall(r"^#+ (.+)$", README, re.M)]
        assert anchor in titles
    for file in re.findall(r"cluster/[\w./-]+\.(?:ya?ml|py)", README):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("command", COMMANDS)
def test_shell_syntax(command: str) -> None:
    assert subprocess.run(["bash", "-n", "-c", command]).returncode == 0
    program = re.sub(r"^\(umask 077; ", "", command).split()[0]
    assert program in {".", "export", "python", "ray", "ssh-keygen"} | NOT_INSTALLED


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("ray ")])
def test_ray_accepts_it(command: str) -> None:
    words = shlex.split(command.partition(" -- ")[0])[1:]
    group: click.Command = ray
    context = click.Context(group)
    while isinstance(group, click.Group):
        name = words.pop(0)
        found = group.get_command(context, name)
        assert found is not None, name
        group = found
    if " -- " in command:
        words += ["--", "true"]
    group.make_context(str(group.name), words, parent=context)


@pytest.mark.parametrize("job", JOBS)
def test_job_accepts_its_flags(job: str) -> None:
    words = job.replace("tuning/search.py", "-m cl_ray tune").split()
    assert words[:3] == ["python", "-m", "cl_ray"]
    kind = {"train": TrainCommand, "doctor": DoctorCommand, "tune": SearchOptions}[words[3]]
    assert parse_flags(kind, words[4:], prog="cl-ray")


@pytest.mark.parametrize("command", [c for c in COMMANDS if "aws_account" in c])
def test_account_script_accepts_it(command: str) -> None:
    script, *flags = shlex.split(command)[1:]
    done = subprocess.run(
        [sys.executable, script, *flags, "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for flag in (word for word in flags if word.startswith("--")):
        assert flag in done.stdout


def test_bucket_and_paths_are_those_that_machines_may_write() -> None:
    for command in JOBS:
        for storage in re.findall(r"--storage (s3://\S+)", command):
            assert storage.startswith("s3://YOUR-BUCKET/runs")


def test_the_script_for_slurm() -> None:
    """Its shell syntax, the options of `ray symmetric-run`, which takes those of `ray start`."""
    page = (ROOT / "docs/slurm.md").read_text()
    script = page.partition("```bash\n")[2].partition("```")[0]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    line = shlex.split("".join(script.partition("ray symmetric-run")[1:]).replace("\\\n", " "))
    start, command = line[: line.index("--")], line[line.index("--") + 1 :]
    assert start[:2] == ["ray", "symmetric-run"]
    known = {
        option
        for name in ("start", "symmetric-run")
        for parameter in ray.commands[name].params
        for option in parameter.opts
    }
    assert {word for word in start if word.startswith("--")} <= known
    assert command[:2] == ["cl-ray", "train"]
    assert parse_flags(TrainCommand, command[2:], prog="cl-ray train").address == "auto"
