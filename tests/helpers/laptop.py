"""The user's laptop: where `ray up` and the other commands are typed."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.cloud import Cloud, wait_for
from helpers.machines import ROOT, stop
from helpers.typed import typed

JOBS = "http://127.0.0.1:8265"
INSTALLS = re.compile(r"  - test -x ~/.local/bin/uv .*\n  - test -d .*\n(  #.*\n)?  - ~/.local.*\n")
"""What a shipped YAML installs from the internet."""


def shipped(name: str, target: Path, **changes: str) -> Path:
    """A shipped YAML, but for what it installs: there, the virtual environment of these tests."""
    text = (ROOT / "cluster" / name).read_text()
    text, found = INSTALLS.subn(f"  - ln -sfn {sys.prefix} ~/venv\n", text)
    assert found == 1
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    target.write_text(text)
    return target


def run(cloud: Cloud, *command: str, ok: bool = True) -> str:
    """Type a command in the repository's root; what it prints."""
    done = subprocess.run(
        command, cwd=ROOT, env=cloud.environment, text=True, timeout=300,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode == 0) is ok, f"{command}\n{done.stdout[-5000:]}"
    return done.stdout


def note(**metrics: float) -> None:
    """Put metrics down for `benchmarks/cluster.py`, where it asks for them."""
    file = os.environ.get("CL_RAY_CLUSTER_FIGURES")
    if file:
        with Path(file).open("a") as lines:
            lines.write(json.dumps(metrics) + "\n")


def make_token(cloud: Cloud) -> None:
    """As cluster/README.md says."""
    run(cloud, *typed("The token", "(umask"))


@contextmanager
def beside(cloud: Cloud, name: str, *command: str) -> Iterator[None]:
    """A command that stays open, as long as it is needed."""
    with (cloud.folder / f"{name}.log").open("wb") as output:
        process = subprocess.Popen(
            command, cwd=ROOT, env=cloud.environment,
            stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True,
        )  # fmt: skip
    try:
        yield
    finally:
        stop(process)


@contextmanager
def dashboard(cloud: Cloud, yaml: Path, target: str = "AWS") -> Iterator[None]:
    """`ray dashboard` of the README, as long as it is needed."""
    shipped_as = f"cluster/{'aws' if target == 'AWS' else 'onprem'}.yaml"
    with beside(cloud, "dashboard", *typed(target, "ray dashboard", {shipped_as: str(yaml)})):
        wait_for(lambda: status(f"{JOBS}/api/version"), 90, "the dashboard's tunnel")
        yield


def status(url: str, token: str | None = None) -> int:
    """The HTTP status that answers; 0 where nothing listens."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=10) as a:
            return int(a.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def ask(cloud: Cloud, path: str) -> Any:
    """What the dashboard answers to one who has the token."""
    token = (cloud.home / ".ray/auth_token").read_text().strip()
    asked = urllib.request.Request(JOBS + path, headers={"Authorization": f"Bearer {token}"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        return json.load(answer)


def text_of(url: str) -> str:
    """What is read there."""
    with urllib.request.urlopen(url, timeout=30) as answer:
        return str(answer.read().decode())


def log_of(cloud: Cloud, job: str) -> str:
    return run(cloud, "ray", "job", "logs", f"--address={JOBS}", job)


def over(cloud: Cloud, job: str) -> str | None:
    """How the job ended; None while it runs."""
    found = str(ask(cloud, f"/api/jobs/{job}")["status"])
    return found if found in ("SUCCEEDED", "FAILED", "STOPPED") else None


def until(cloud: Cloud, job: str, what: Callable[[], Any], name: str) -> None:
    """Wait for something that a job does; what the job said, if it does not."""
    try:
        wait_for(lambda: what() or over(cloud, job), 400, name)
    except AssertionError:
        raise AssertionError(f"{name}: {log_of(cloud, job)}") from None
    assert what(), log_of(cloud, job)


def left_over(cloud: Cloud) -> list[str]:
    """Ray's processes that this laptop's commands left behind."""
    home = f"HOME={cloud.home}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if home in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
