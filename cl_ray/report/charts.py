"""Charts by plotly, with one theme for the pages of runs and of searches.

A page holds plotly.js once, after its text and images, and draws the figures from their JSON. The
colours of a figure are those of `PALETTE`; page.js exchanges them where the reader prefers dark.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import plotly.graph_objects as go
from numpy.typing import NDArray

from cl_ray.report.records import MetricCurve

PALETTE = {
    "paper": ("#fbfaf8", "#14171a"), "card": ("#ffffff", "#1b1f23"), "ink": ("#1f2328", "#e6e4df"),
    "quiet": ("#5d6570", "#9aa3ad"), "line": ("#e4e1db", "#2d3339"),
    "accent": ("#0b6e99", "#5bb8e0"), "d": ("#c2410c", "#fb923c"), "g": ("#0b6e99", "#5bb8e0"),
    "real": ("#15803d", "#4ade80"), "fake": ("#a21caf", "#e879f9"),
    "c0": ("#4e79a7", "#7ba6d6"), "c1": ("#f28e2b", "#ffa94d"), "c2": ("#e15759", "#f5787a"),
    "c3": ("#4aa8a2", "#6fcfc8"), "c4": ("#59a14f", "#7cc672"), "c5": ("#c9a227", "#f0d264"),
    "c6": ("#b07aa1", "#cf9fc4"), "c7": ("#e2799a", "#ffa3c0"), "c8": ("#9c755f", "#c79a80"),
    "c9": ("#8a8583", "#b8b2af"),
}  # fmt: skip
"""Colours of the pages and of their charts by name: on light screens and paper, on dark screens."""
COLOURS = {name: light for name, (light, _) in PALETTE.items()}
CYCLE = [COLOURS[f"c{i}"] for i in range(10)]
MAX_POINTS = 240
"""Points of a line at most: more lie closer than a pixel."""
_BINS = 24
_MAX_EPOCH_LINES = 24
_AXIS = {
    "automargin": True,
    "exponentformat": "none",
    "fixedrange": True,
    "gridcolor": COLOURS["line"],
    "zerolinecolor": COLOURS["line"],
    "linecolor": COLOURS["line"],
    "title": {"standoff": 6, "font": {"size": 12}},
    "ticks": "outside",
    "ticklen": 4,
    "tickcolor": "rgba(0,0,0,0)",  # invisible: it keeps the numbers of two axes apart
}
_LABEL = {"bgcolor": COLOURS["card"], "bordercolor": COLOURS["line"]}
THEME: dict[str, Any] = {
    "layout": {
        "colorway": [COLOURS["g"], COLOURS["d"], *CYCLE[2:]],
        "font": {"size": 12, "color": COLOURS["quiet"], "family": "system-ui, sans-serif"},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "margin": {"t": 30, "r": 12, "b": 8, "l": 8},
        "dragmode": False,  # a finger on a chart scrolls the page
        "hovermode": "closest",
        "hoverlabel": {**_LABEL, "font": {"color": COLOURS["ink"]}},
        "legend": {"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
    }
}
"""A template for plotly figures; optuna's take it as well."""


@dataclass(frozen=True)
class Chart:
    """A plotly figure and what the page says around it.

    Args:
        title: What is shown, with its unit.
        alt: What the chart shows, for readers who do not see it.
        figure: The figure, without a title.
        note: A sentence below it.
        min_width: Width in pixels below which it scrolls by itself instead of shrinking.
        wide: Whether it takes the whole width of the page.
    """

    title: str
    alt: str
    figure: go.Figure = field(repr=False)
    note: str = ""
    height: int = 230
    min_width: int = 0
    wide: bool = False

    def to_json(self) -> str:
        """Return the figure in the theme, as JSON that may stand inside of a script element."""
        self.figure.layout.template, self.figure.layout.title = THEME, None
        return str(self.figure.to_json()).replace("<", "\\u003c")


def line_chart(
    title: str,
    curves: dict[str, tuple[str, MetricCurve]],
    epoch_ends: Sequence[int] = (),
    from_zero: bool = False,
    fraction: bool = False,
) -> Chart:
    """Draw curves over the training steps.

    Args:
        title: The chart's title.
        curves: Colour and curve by their name in the legend.
        epoch_ends: Steps at which epochs ended, drawn while they are few.
        from_zero: Whether the vertical axis contains 0.
        fraction: Whether the values are fractions of 1, which are written in per cent.
    """
    write = format_percent if fraction else format_number
    figure, words, last_step = go.Figure(), [], 0
    for name, (colour, whole) in curves.items():
        curve = whole.thinned(MAX_POINTS)
        first, last = write(curve.values[0]), write(curve.values[-1])
        words.append(f"{name} from {first} to {last}")
        last_step = max(last_step, int(curve.steps[-1]))
        figure.add_scatter(
            x=curve.steps,
            y=curve.values,
            mode="lines" if len(curve.steps) > 1 else "markers",
            line={"color": COLOURS[colour], "width": 2},
            name=f"{name} <b>{last}</b>",
            hovertemplate=f"{name} %{{y:{'.2%' if fraction else '.3~g'}}}<extra></extra>",
        )
    if len(epoch_ends) <= _MAX_EPOCH_LINES:
        for end in epoch_ends:
            line = {"color": COLOURS["quiet"], "dash": "dot", "width": 1}
            figure.add_vline(x=end, line=line, opacity=0.4, layer="below")
    figure.update_layout(
        showlegend=True,
        hovermode="x unified",
        xaxis={"title": "step", "range": [0, last_step * 1.01], "tickformat": "~s"},
        yaxis={
            "rangemode": "tozero" if from_zero else "normal",
            "tickformat": ".5~%" if fraction else None,
            "nticks": 6,
        },
    )
    figure.update_xaxes(hoverformat=",d")
    return Chart(title, f"{title}, over {last_step:,} steps: {'; '.join(words)}.", figure)


def path_chart(
    title: str,
    x: tuple[str, MetricCurve],
    y: tuple[str, MetricCurve],
    target: tuple[float, float, str] | None = None,
) -> Chart:
    """Draw one curve against another, as a path from the start of the run to its end.

    It grows darker with time. Both have a name; `target` is a point to compare with, and its name.
    """
    path = x[1].thinned(MAX_POINTS)
    xs, ys = path.values, y[1].thinned(MAX_POINTS).values
    figure = go.Figure()
    hover = "D %{x:.3~g}, G %{y:.3~g}<extra></extra>"
    figure.add_scatter(
        x=xs,
        y=ys,
        customdata=path.steps,
        mode="lines+markers",
        line={"color": COLOURS["line"], "width": 2},
        marker={"color": path.steps, "colorscale": [COLOURS["line"], COLOURS["quiet"]], "size": 5},
        hovertemplate=f"step %{{customdata:,d}}: {hover}",
    )
    spots = [
        (xs[0], ys[0], "start", "circle-open", "top center"),
        (xs[-1], ys[-1], "end", "circle", "top center"),
        *([(*target, "x-thin-open", "bottom left")] if target else []),
    ]
    spot_x, spot_y, names, symbols, sides = zip(*spots, strict=True)
    figure.add_scatter(
        x=spot_x,
        y=spot_y,
        mode="markers+text",
        text=names,
        textposition=sides,
        textfont={"color": COLOURS["ink"]},
        marker={"symbol": symbols, "size": 10, "color": COLOURS["ink"], "line": {"width": 2}},
        cliponaxis=False,
        hovertemplate=f"%{{text}}: {hover}",
    )
    figure.update_layout(showlegend=False, xaxis={"title": x[0]}, yaxis={"title": y[0]})
    alt = (
        f"{title}: from {format_number(xs[0])} and {format_number(ys[0])} at the start to "
        f"{format_number(xs[-1])} and {format_number(ys[-1])} at the end."
    )
    return Chart(title, alt, figure, height=300)


def histogram_chart(
    title: str, groups: dict[str, tuple[str, NDArray[np.float64]]], x_name: str
) -> Chart:
    """Draw the distribution of groups of values: for each, the fraction of its values by bin.

    Groups are colour and values by their name in the legend.
    """
    together = np.concatenate([values for _, values in groups.values()])
    edges = np.linspace(together.min(), max(together.max(), together.min() + 1e-6), _BINS + 1)
    figure = go.Figure()
    for name, (colour, values) in groups.items():
        figure.add_scatter(
            x=(edges[:-1] + edges[1:]) / 2,
            y=np.histogram(values, edges)[0] / len(values),
            mode="lines",
            line={"color": COLOURS[colour], "width": 2},
            name=name,
            hovertemplate=f"{name} %{{y:.1%}}<extra></extra>",
        )
    figure.update_layout(
        showlegend=True,
        hovermode="x unified",
        xaxis={"title": x_name, "hoverformat": ".3~g"},
        yaxis={"tickformat": "~%", "rangemode": "tozero"},
    )
    medians = "; ".join(
        f"{name}, median {format_number(float(np.median(v)))}" for name, (_, v) in groups.items()
    )
    return Chart(title, f"{title}: {medians}.", figure, height=300)


def format_number(value: float) -> str:
    """Format with three significant digits; from 1,000 on as a whole number."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return np.format_float_positional(value, precision=3, fractional=False, trim="-")


def format_percent(value: float) -> str:
    """Format a fraction of 1 as 97.67%: near 1, one decimal does not tell two runs apart."""
    return f"{value:.2%}"


def capitalize(text: str) -> str:
    """Return a text whose first letter is a capital; the others stay."""
    return text[:1].upper() + text[1:]
