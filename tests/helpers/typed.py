"""Commands of cluster/README.md, typed as they stand there but for names, and for what is long."""

import re
from collections.abc import Mapping

from helpers.machines import ROOT

README = (ROOT / "cluster" / "README.md").read_text()
TYPED: set[str] = set()
"""The commands that were typed so far."""


def section(title: str) -> str:
    """The text under a heading."""
    found = re.search(
        rf"^## {re.escape(title)}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL
    )
    assert found, title
    return found.group(1)


def commands(title: str) -> list[str]:
    """The commands under a heading, in their order."""
    return re.findall(r"^    (\S.*)$", section(title), re.MULTILINE)


def typed(title: str, beginning: str, changes: Mapping[str, str] | None = None) -> tuple[str, ...]:
    """The one command under a heading that begins so, for a shell.

    Args:
        title: The heading.
        beginning: How the command begins.
        changes: What stands there, and what is typed instead.
    """
    (command,) = [each for each in commands(title) if each.startswith(beginning)]
    TYPED.add(command)
    for old, new in (changes or {}).items():
        assert old in command, (old, command)
        command = command.replace(old, new)
    return "bash", "-c", command
