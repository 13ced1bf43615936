"""The terminal: it shows names, notes and errors of any origin as text, whatever they contain."""

from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from cl_ray.errors import printable


class PlainConsole(Console):
    """A rich console in which text is never markup and never controls the terminal.

    Styles come from `rich.text.Text`. A string that is printed is one line: line feeds in it are
    escaped, as all control characters are; in tables and `Text` line feeds stay.
    """

    def __init__(self, **options: Any):
        super().__init__(markup=False, emoji=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """Print strings, each as one line, and other renderables."""
        super().print(*(printable(o) if isinstance(o, str) else o for o in objects), **options)

    def render_str(self, text: str, **options: Any) -> Text:
        """Convert a string, such as a cell of a table, to a text as wide as it is shown."""
        return super().render_str(printable(text, keep="\n"), **options)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """Render anything, with the control characters of its texts escaped."""
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text, keep="\n")
            yield segment._replace(text=text)


def print_line(console: Console, text: str) -> None:
    """Print a text as one line, which the terminal wraps, without markup or highlighting."""
    console.print(printable(text), soft_wrap=True, markup=False, emoji=False, highlight=False)


def print_fields(console: Console, fields: Mapping[str, object], width: int) -> None:
    """Print names and values as two columns, a line each; the first column has that width."""
    for name, value in fields.items():
        line = Text.assemble((f"{name:<{width}}", "bold"), printable(str(value)))
        console.print(line, soft_wrap=True, highlight=False)
