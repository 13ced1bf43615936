"""Text that is safe to show; durations."""

import sys
from unicodedata import bidirectional, category

import pytest

from cl_ray.errors import UserError, format_duration, printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe 数据 прогон 🦋 \u200d\u200f\u00a0", "Größe 数据 прогон 🦋 \u200d\u200f\u00a0"),
        ("\x1b]8;;file\x07y", r"\x1b]8;;file\x07y"),
        ("a\rb\nc\td\x00\x7f", r"a\rb\nc\td\x00\x7f"),
        ("\x9b2J \x90 \x85", r"\x9b2J \x90 \x85"),
        ("\u202egpj.exe\u202c \u2066x\u2069", r"\u202egpj.exe\u202c \u2066x\u2069"),
        ("\u2028 \udcff", r"\u2028 \udcff"),
    ],
)
def test_control_characters_are_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    assert str(UserError(text)) == shown


def test_what_is_kept() -> None:
    assert printable("a\n\x1b", keep="\n") == "a\n\\x1b"


def test_no_other_character_is_a_control() -> None:
    """Unicode's own categories: Cc, Cs, Zl, Zp; and those of bidirectional overrides."""
    overrides = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
    everything = set(map(chr, range(sys.maxunicode + 1)))
    controls = {c for c in everything if category(c) in ("Cc", "Cs", "Zl", "Zp")}
    controls |= {c for c in everything if bidirectional(c) in overrides}
    assert all(printable(character) != character for character in controls)
    others = "".join(everything - controls)
    assert printable(others) == others


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.7, "1:00"), (296, "4:56"), (3723, "1:02:03")],
)
def test_durations(seconds: float, shown: str) -> None:
    assert format_duration(seconds) == shown
