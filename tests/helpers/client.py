"""The user's own computer: runs commands of cluster/README.md and asks the cluster's dashboard."""

import json
import re
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from helpers.cloud import Cloud
from helpers.machines import ROOT, stop
from helpers.processes import wait_for

README = (ROOT / "cluster" / "README.md").read_text()
DASHBOARD = "http://127.0.0.1:8265"
INSTALL = re.compile(r"(  - python3 -c .*\n)?  - test -x ~/.uv/.*\n  - test -d .*\n  - ~/.uv/.*\n")
"""The lines of a shipped YAML that install from the internet."""
USED_COMMANDS: set[str] = set()
"""The README's commands that were run so far."""


def readme_section(title: str) -> str:
    """The text under a heading of the README."""
    pattern = rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)"
    match = re.search(pattern, README, re.MULTILINE | re.DOTALL)
    assert match, title
    return match.group(1)


def readme_commands(title: str) -> list[str]:
    """The commands under a heading, in order."""
    return re.findall(r"^    (\S.*)$", readme_section(title), re.MULTILINE)


def readme_command(
    title: str, prefix: str, replace: Mapping[str, str] | None = None
) -> tuple[str, ...]:
    """The only command under a heading with that prefix, as arguments that run it in a shell.

    Args:
        title: The heading.
        prefix: How the command starts.
        replace: Texts of the command, and what is run instead.
    """
    (command,) = [each for each in readme_commands(title) if each.startswith(prefix)]
    USED_COMMANDS.add(command)
    for old, new in (replace or {}).items():
        assert old in command, (old, command)
        command = command.replace(old, new)
    return "bash", "-c", command


def shipped_yaml(name: str, target: Path, **replace: str) -> Path:
    """Copy a shipped YAML; in place of what it installs, this virtual environment is linked."""
    text = (ROOT / "cluster" / name).read_text()
    text, found = INSTALL.subn(f"  - ln -sfn {sys.prefix} ~/cl_ray/venv\n", text)
    assert found == 1
    for old, new in replace.items():
        assert old in text
        text = text.replace(old, new)
    target.write_text(text)
    return target


def run(cloud: Cloud, *command: str, ok: bool = True) -> str:
    """Run a command in the repository's root and return its output."""
    done = subprocess.run(
        command, cwd=ROOT, env=cloud.environment, text=True, timeout=600,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (done.returncode == 0) is ok, f"{command}\n{done.stdout[-5000:]}"
    return done.stdout


def run_readme(
    cloud: Cloud, title: str, prefix: str, replace: Mapping[str, str] | None = None
) -> str:
    """Run a command of the README, see `readme_command`, and return its output."""
    return run(cloud, *readme_command(title, prefix, replace))


def create_token(cloud: Cloud) -> None:
    """Create the token with the README's command."""
    run_readme(cloud, "The token", "(umask")


@contextmanager
def background(cloud: Cloud, name: str, *command: str) -> Iterator[None]:
    """Run a command that stays open within the context."""
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
def dashboard(cloud: Cloud, yaml: Path, title: str = "AWS") -> Iterator[None]:
    """Keep the tunnel of the README's `ray dashboard` open within the context."""
    shipped = f"cluster/{'aws' if title == 'AWS' else 'onprem'}.yaml"
    command = readme_command(title, "ray dashboard", {shipped: str(yaml)})
    with background(cloud, "dashboard", *command):
        wait_for(lambda: http_get(f"{DASHBOARD}/api/version")[0], "the dashboard's tunnel", 0.5)
        yield


def http_get(url: str, token: str | None = None) -> tuple[int, str]:
    """The HTTP status and the text of an answer; the status is 0 if nothing listens."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    request = urllib.request.Request(url, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return int(answer.status), str(answer.read().decode())
    except urllib.error.HTTPError as error:
        return error.code, ""
    except OSError:
        return 0, ""


def get_json(cloud: Cloud, path: str) -> Any:
    """The dashboard's answer to a request with the token."""
    return json.loads(http_get(DASHBOARD + path, read_token(cloud))[1])


def wait_for_nodes(cloud: Cloud, yaml: Path, addresses: set[str]) -> None:
    """Wait until exactly these machines are in the cluster; fail with the autoscaler's log."""

    def joined() -> bool:
        nodes = get_json(cloud, "/nodes?view=summary")["data"]["summary"]
        return {n.get("ip") for n in nodes if n["raylet"].get("state") == "ALIVE"} == addresses

    try:
        wait_for(joined, "the cluster's machines", 0.5, seconds=600)
    except AssertionError:
        logs = "ray list nodes; tail -n 100 /tmp/ray/session_latest/logs/monitor.{log,out,err}"
        raise AssertionError(run(cloud, "ray", "exec", str(yaml), logs)) from None


def read_token(cloud: Cloud) -> str:
    return (cloud.home / ".ray/auth_token").read_text().strip()


def job_log(cloud: Cloud, job: str) -> str:
    return run(cloud, "ray", "job", "logs", f"--address={DASHBOARD}", job)


def job_result(cloud: Cloud, job: str) -> str | None:
    """The final status of a job; None while it runs."""
    status = str(get_json(cloud, f"/api/jobs/{job}")["status"])
    return status if status in ("SUCCEEDED", "FAILED", "STOPPED") else None


def wait_for_job(cloud: Cloud, job: str, condition: Callable[[], Any], name: str) -> None:
    """Wait for something that a job does; fail with its log if it does not."""
    try:
        wait_for(lambda: condition() or job_result(cloud, job), name, 0.5, seconds=900)
    except AssertionError:
        raise AssertionError(f"{name}: {job_log(cloud, job)}") from None
    assert condition(), job_log(cloud, job)


def wait_for_success(cloud: Cloud, job: str) -> str:
    """Wait for the end of a job and return its log."""
    wait_for_job(cloud, job, lambda: job_result(cloud, job) == "SUCCEEDED", "the end of the job")
    return job_log(cloud, job)


def leftover_processes(cloud: Cloud) -> list[str]:
    """Command lines of processes that this computer's commands left behind."""
    home = f"HOME={cloud.home}".encode()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if home in (folder / "environ").read_bytes().split(b"\0"):
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found
