"""Text of any origin in a terminal: never markup, never control."""

import ast
import io
import re
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, TextColumn
from rich.table import Table
from rich.text import Text

from cl_ray.console import PlainConsole, print_fields, print_line
from cl_ray.errors import printable

HOSTILE = "[/a/b] [red]x[/red] :warning: \x1b[2J \x1b]0;title\x07 \x9b31m \u202etxt\r\x08 \ud800"
SHOWN = r"[/a/b] [red]x[/red] :warning: \x1b[2J \x1b]0;title\x07 \x9b31m \u202etxt\r\x08 \ud800"
PACKAGE = Path(__file__).parent.parent / "cl_ray"


def printed(*objects: object) -> str:
    console = PlainConsole(file=io.StringIO(), width=200)
    console.print(*objects)
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_a_string_is_one_line() -> None:
    assert printed(HOSTILE) == f"{SHOWN}\n"
    assert printed("a\nb\tc") == "a\\nb\\tc\n"


def test_tables_texts_and_fields() -> None:
    text, shown = HOSTILE, SHOWN
    for character in "\x07\r\x08":  # rich leaves them out
        text, shown = text.replace(character, ""), shown.replace(printable(character), "")
    assert printed(Text(text)) == f"{shown}\n"
    table = Table("head [b]", title="title [/]")
    table.add_row(text)
    assert shown in printed(table)
    assert "head [b]" in printed(table)
    assert "title [/]" in printed(table)
    console = PlainConsole(file=io.StringIO(), width=20)
    print_fields(console, {"name": HOSTILE, "number": 1}, 8)
    assert console.file.getvalue() == f"name    {SHOWN}\nnumber  1\n"  # type: ignore[attr-defined]


def test_what_is_live_in_a_terminal() -> None:
    screen = io.StringIO()
    console = PlainConsole(file=screen, width=200, force_terminal=True, color_system=None)
    with Live(Text("a \x1b[2J"), console=console):
        pass
    column = TextColumn("{task.description}", markup=False)
    with Progress(column, console=console) as progress:
        progress.add_task("b [/] \x1b[2J and so on")
    with console.status(Text("c [/] \x1b[2J")):
        pass
    assert "\x1b[2J" not in screen.getvalue()
    for name in ("a ", "b [/] ", "c [/] "):
        assert f"{name}\\x1b[2J" in screen.getvalue()


def test_a_line_on_a_console_of_the_callers() -> None:
    output = io.StringIO()
    print_line(Console(file=output, width=20), HOSTILE)
    assert output.getvalue() == f"{SHOWN}\n"


def test_every_console_of_the_package_is_a_plain_one() -> None:
    """Names, notes and errors reach all of them; `Status` and `TextColumn` parse markup always."""
    wrong = []
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "rich.markup":
                wrong.append(f"{file.name}: rich.markup")
            if isinstance(node, ast.ImportFrom) and node.module == "rich":
                wrong.append(f"{file.name}: from rich import")
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            first = ast.unparse(node.args[0]) if node.args else ""
            name = called.rpartition(".")[2]
            is_fixed = bool(re.fullmatch(r"'[^\[\]]*'", first)) or first.startswith("Text(")
            if (
                (name == "Console" and file.name != "console.py")
                or name == "from_markup"
                or (name == "TextColumn" and "markup=False" not in ast.unparse(node))
                or (called in ("console.status", "status.update") and not is_fixed)
            ):
                wrong.append(f"{file.name}: {ast.unparse(node)}")
    assert not wrong
