"""Charts as SVG: what a template needs to draw lines, a path through a plane, and points.

Drawn here rather than by plotly, whose script alone is 1 to 5 MB and takes its colours and sizes
once: an SVG takes them from the page's style sheet, so that one chart serves light, dark, phone
and print, and it is a few kB. What plotly would add, reading values off, is page.js.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from cl_ray.report.records import MetricCurve

WIDTH, HEIGHT = 360, 210
"""Units of a chart: about a phone's pixels, so that its letters are as large as the text's."""
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 8, 24
POINTS = 240
"""Points of a line at most: more would lie closer than a pixel."""
PARTS = 12
"""Pieces of a path through a plane; they grow darker with time."""

Values = NDArray[np.float64] | Sequence[float]


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in units of the chart, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        name: What the legend calls it.
        colour: A class of the style sheet.
        path: The line, as SVG's `d`.
        values: Its values as words, point by point.
    """

    name: str
    colour: str
    path: str
    values: list[str]


@dataclass(frozen=True)
class Chart:
    """What chart.html draws.

    Args:
        title: What is shown, with its unit.
        alt: What the chart shows, for those who do not see it.
        x_name: What the horizontal axis is.
        x_ticks: Its marks.
        y_ticks: Those of the vertical axis.
        lines: The lines.
        xs: Where the points of all lines are, horizontally.
        x_values: The same as words.
        rules: Where vertical lines stand, such as at the ends of epochs.
        note: A sentence below.
        y_name: What the vertical axis is, where the title does not say.
        spots: Single points with their words.
        height: In units.
    """

    title: str
    alt: str
    x_name: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    xs: list[float] = field(default_factory=list)
    x_values: list[str] = field(default_factory=list)
    rules: list[float] = field(default_factory=list)
    note: str = ""
    y_name: str = ""
    spots: list[tuple[float, float, str, str]] = field(default_factory=list)
    height: int = HEIGHT


def by_step(
    title: str,
    curves: dict[str, tuple[str, MetricCurve]],
    epoch_ends: Sequence[int] = (),
    note: str = "",
    least: float | None = None,
    share: bool = False,
) -> Chart:
    """Curves over the steps.

    Args:
        title: What is shown.
        curves: By the legend's name: colour and curve. All have the same steps.
        epoch_ends: Steps at which epochs ended; drawn while they are few.
        note: A sentence below.
        least: What the vertical axis reaches down to at least, such as 0 for a speed.
        share: Whether the values are shares of 1, which are written as per cent.
    """
    write, mark = (share_of, per_cent) if share else (number, short)
    thin = {name: (colour, curve.thinned(POINTS)) for name, (colour, curve) in curves.items()}
    steps = next(iter(thin.values()))[1].steps
    everything = np.concatenate([curve.values for _, curve in thin.values()])
    low = everything.min() if least is None else min(least, everything.min())
    x, x_ticks = axis(0, float(steps[-1]), LEFT, WIDTH - RIGHT, most=5)
    high = float(everything.max())
    y, y_ticks = axis(float(low), high, HEIGHT - BOTTOM, TOP, form=mark, grow=True)
    words = [
        f"{name} from {write(c.values[0])} to {write(c.values[-1])}"
        for name, (_, c) in thin.items()
    ]
    return Chart(
        title=title,
        alt=f"{title}, over {steps[-1]:,} steps: {'; '.join(words)}.",
        x_name="step",
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        lines=[
            Line(name, colour, path(x(c.steps), y(c.values)), [write(v) for v in c.values])
            for name, (colour, c) in thin.items()
        ],
        xs=[round(float(v), 1) for v in x(steps)],
        x_values=[f"{step:,}" for step in steps],
        rules=[float(x(np.array(end))) for end in epoch_ends] if len(epoch_ends) <= 24 else [],
        note=note,
    )


def through_plane(
    title: str,
    across: tuple[str, MetricCurve],
    up: tuple[str, MetricCurve],
    spot: tuple[float, float, str] | None = None,
    note: str = "",
) -> Chart:
    """One curve against another, a path from the run's start to its end.

    Args:
        title: What is shown.
        across: Name and curve of the horizontal axis.
        up: Of the vertical one.
        spot: A point to steer by, and what it is.
        note: A sentence below.
    """
    xs, ys = across[1].thinned(POINTS).values, up[1].thinned(POINTS).values
    ends = [spot[:2]] if spot else []
    height = 300
    x, x_ticks = axis(*_range(xs, [e[0] for e in ends]), LEFT, WIDTH - RIGHT, most=5, grow=True)
    y, y_ticks = axis(*_range(ys, [e[1] for e in ends]), height - BOTTOM - 12, TOP, grow=True)
    px, py = x(xs), y(ys)
    spots = [(px[0], py[0], "start", "hollow"), (px[-1], py[-1], "end", "full")]
    if spot:
        spots.append((float(x(np.array(spot[0]))), float(y(np.array(spot[1]))), spot[2], "cross"))
    cuts = np.linspace(0, len(xs) - 1, min(PARTS, max(len(xs) - 1, 1)) + 1).astype(int)
    return Chart(
        title=title,
        alt=f"{title}: from {number(xs[0])} and {number(ys[0])} at the start to {number(xs[-1])} "
        f"and {number(ys[-1])} at the end.",
        x_name=across[0],
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        lines=[
            Line("", "ink", path(px[a : b + 1], py[a : b + 1]), [])
            for a, b in pairwise(cuts.tolist())
        ],
        note=note,
        y_name=up[0],
        spots=[(round(float(a), 1), round(float(b), 1), text, kind) for a, b, text, kind in spots],
        height=height,
    )


def over_values(
    title: str, sets: dict[str, tuple[str, Values]], x_name: str, note: str = ""
) -> Chart:
    """How values are distributed, a line of shares for each set of them, in 24 bins."""
    everything = np.concatenate([np.asarray(values) for _, values in sets.values()])
    edges = np.linspace(everything.min(), max(everything.max(), everything.min() + 1e-6), 25)
    shares = {
        name: (colour, np.histogram(values, edges)[0] / len(values))
        for name, (colour, values) in sets.items()
    }
    middles = (edges[:-1] + edges[1:]) / 2
    x, x_ticks = axis(float(edges[0]), float(edges[-1]), LEFT, WIDTH - RIGHT, most=6)
    top = max(float(share.max()) for _, share in shares.values())
    y, y_ticks = axis(0, top, HEIGHT - BOTTOM, TOP, form=percent, grow=True)
    medians = "; ".join(f"{name}, median {number(np.median(v))}" for name, (_, v) in sets.items())
    return Chart(
        title=title,
        alt=f"{title}: {medians}.",
        x_name=x_name,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        lines=[
            Line(name, colour, path(x(middles), y(share)), [percent(v) for v in share])
            for name, (colour, share) in shares.items()
        ],
        xs=[round(float(v), 1) for v in x(middles)],
        x_values=[number(v) for v in middles],
        note=note,
    )


Scale = Callable[[NDArray[np.generic]], NDArray[np.float64]]


def axis(
    low: float,
    high: float,
    start: float,
    end: float,
    most: int = 5,
    form: Callable[[float], str] | None = None,
    grow: bool = False,
) -> tuple[Scale, list[Tick]]:
    """From values to units of the chart, and the axis's marks at 1, 2 or 5 times a power of ten.

    Args:
        low: The smallest value.
        high: The largest.
        start: Where the smallest is, in units.
        end: Where the largest is.
        most: Marks at most.
        form: How a mark's value is written.
        grow: Let the axis end at marks.
    """
    if high - low < 1e-9 * max(abs(high), 1e-9):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / most
    power = 10.0 ** np.floor(np.log10(rough))
    gap = next(power * m for m in (1, 2, 5, 10) if power * m >= rough * 0.999)
    if grow:
        low, high = np.floor(low / gap + 1e-9) * gap, np.ceil(high / gap - 1e-9) * gap
    marks = np.arange(np.ceil(low / gap - 1e-9), np.floor(high / gap + 1e-9) + 1) * gap

    def scale(values: NDArray[np.generic]) -> NDArray[np.float64]:
        return start + (np.asarray(values, np.float64) - low) / (high - low) * (end - start)

    places = scale(marks)
    write = form or short
    return scale, [
        Tick(round(float(at), 1), write(float(v))) for at, v in zip(places, marks, strict=True)
    ]


def path(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """A line through points, as SVG's `d`; a single point is drawn as a dot."""
    points = [f"{a:.1f} {b:.1f}" for a, b in zip(x, y, strict=True)]
    return "M" + "L".join(points if len(points) > 1 else points * 2)


def dots(x: NDArray[np.float64], y: NDArray[np.float64]) -> str:
    """Separate points: lines of no length, which round ends make dots of."""
    return "".join(f"M{a:.1f} {b:.1f}h0" for a, b in zip(x, y, strict=True))


def number(value: float) -> str:
    """Three digits that count; from 1,000 on, whole."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def count(many: int, what: str) -> str:
    """1 epoch, 2 epochs."""
    return f"{many:,} {what}{'' if many == 1 else 's'}"


def short(value: float) -> str:
    """A mark's value: 2k, 0.5, 0."""
    value = round(value, 10) + 0.0
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if abs(value) >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def percent(value: float) -> str:
    """A share as per cent, one place below 10 %."""
    value += 0.0  # no -0%
    return f"{value:.0%}" if value >= 0.0995 or value == 0 else f"{value:.1%}"


def share_of(value: float) -> str:
    """0.97671 as 97.67%: near 1, where two runs differ, a tenth says too little."""
    return f"{value:.2%}"


def per_cent(value: float) -> str:
    """A mark's share as per cent, as many places as it has: 95%, 97.5%."""
    return f"{round(100 * value, 8) + 0.0:g}%"


def _range(values: NDArray[np.float64], others: list[float]) -> tuple[float, float]:
    return float(min([values.min(), *others])), float(max([values.max(), *others]))
