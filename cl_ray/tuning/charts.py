"""The charts of a search, by plotly: what is read off them and pointed at stays readable.

The names and the size of a chart are the page's matter, so that one chart serves a desk and a
phone; its letters and lines take their colours from the page's style sheet.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from cl_ray.report.chart import count, number, percent
from cl_ray.tuning.importance import FEWEST
from cl_ray.tuning.leaderboard import best_trials, format_values, pareto_front, short
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, TrialResult

LOOKS = {
    "finished": ("#3b82c4", "circle"),
    "stopped": ("#8a94a3", "triangle-down"),
    "diverged": ("#c53030", "x"),
    "collapsed": ("#dd6b20", "square"),
    "failed": ("#805ad5", "cross"),
    "running": ("#38a169", "circle-open"),
}
"""Colour and symbol by how a trial ended."""
ENDED = {"stopped": "stopped early", "running": "still running"}
LETTER = 7.5
"""Width of a letter in an axis's name, in pixels, at most on the mean."""


@dataclass(frozen=True)
class SearchChart:
    """A chart, and what the page says around it.

    Args:
        title: What is shown.
        figure: Plotly's, without a title.
        note: A sentence below.
        height: In pixels.
        width: In pixels, below which it scrolls by itself rather than shrinks.
        wide: Whether it takes the page's whole width.
    """

    title: str
    figure: go.Figure
    note: str = ""
    height: int = 360
    width: int = 0
    wide: bool = False

    def to_html(self, script: bool) -> str:
        """As a part of a page; the first one of a page brings plotly's script along."""
        self.figure.update_layout(
            template="plotly_white",
            margin={"t": 36, "r": 16, "b": 8, "l": 8} | (self.figure.layout.meta or {}),
            dragmode=False,  # a finger on it scrolls the page
            font={"size": 12, "color": "#5d6570", "family": "system-ui, sans-serif"},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            legend={"orientation": "h", "x": 0, "y": 1, "yanchor": "bottom"},
        )
        # Marks of no colour keep the numbers of two axes apart where these meet.
        for turn in (self.figure.update_xaxes, self.figure.update_yaxes):
            turn(ticks="outside", ticklen=6, tickcolor="rgba(0,0,0,0)")
        return str(
            self.figure.to_html(
                full_html=False,
                include_plotlyjs=script,
                default_height=f"{self.height}px",
                config={"displayModeBar": False, "responsive": True},
            )
        )


def history(rows: list[TrialResult], metric: SearchMetric, epochs: int) -> SearchChart:
    """Each trial's figure in the order of the trials, and the best so far.

    Args:
        rows: All trials, by number.
        metric: Whose figure.
        epochs: How many a trial has that is not stopped.
    """
    figure = go.Figure()
    shown = [row for row in rows if metric.name in row.metrics]
    for status, (colour, symbol) in LOOKS.items():
        some = [row for row in shown if row.status == status]
        if some:
            figure.add_scatter(
                x=[row.number for row in some],
                y=[row.metrics[metric.name] for row in some],
                text=[f"after {count(r.epoch, 'epoch')}: {format_values(r.values)}" for r in some],
                mode="markers",
                marker={"color": colour, "symbol": symbol, "size": 10},
                name=f"{ENDED.get(status, status)}, after {lengths(some)}",
            )
    whole = [row for row in shown if row.status == "finished"]
    whole = whole or [row for row in shown if row.counts]
    best: list[float] = []
    choose = max if metric.larger else min
    for row in whole:
        best.append(choose([row.metrics[metric.name], *best[-1:]]))
    figure.add_scatter(
        x=[row.number for row in whole], y=best, mode="lines", name="best so far",
        line={"color": "#3b82c4", "shape": "hv"},
    )  # fmt: skip
    first = best_trials(rows, [metric])
    if first:
        left = first.number > len(rows) / 2
        figure.add_annotation(
            x=first.number,
            y=math.log10(best[-1]) if is_log(metric, shown) else best[-1],
            text=f"<b>best: {number(best[-1])}</b> (trial {first.number})",
            showarrow=False,
            xanchor="right" if left else "left",
            yanchor="bottom" if metric.larger else "top",
            yshift=6 if metric.larger else -6,
        )
    values = [row.metrics[metric.name] for row in shown]
    y = around(metric.name, values) if is_log(metric, shown) else {"title": metric.name}
    figure.update_layout(
        xaxis={"title": "trial", "tick0": 0, "dtick": tick_step(len(rows)), "tickformat": "d"},
        yaxis={"exponentformat": "none", "automargin": True, **y},
    )
    notes = [unlike(shown, epochs)]
    without = [row for row in rows if metric.name not in row.metrics]
    if without:
        kinds = [r.status for r in without]
        ends = sorted({*kinds})
        said = ", ".join(f"{kinds.count(end)} {ENDED.get(end, end)}" for end in ends)
        notes.append(f"Without a figure: {said}.")
    return SearchChart(
        f"{metric.name} by trial", figure, " ".join(filter(None, notes)), 400, wide=True
    )


def pareto(rows: list[TrialResult], metrics: list[SearchMetric], epochs: int) -> list[SearchChart]:
    """The front of the first two metrics, where there are two or more.

    Args:
        rows: All trials.
        metrics: What is optimised.
        epochs: How many a trial has that is not stopped.
    """
    counted = [row for row in rows if row.counts]
    if len(metrics) < 2 or not counted:
        return []
    first, second = metrics[:2]
    best = sorted(pareto_front(counted, metrics), key=lambda r: r.metrics[first.name])
    figure = go.Figure()
    whole = [row for row in counted if row.status == "finished"]
    early = [row for row in counted if row.status == "stopped"]
    for name, some, (colour, symbol) in (
        ("finished", whole, LOOKS["finished"]),
        ("stopped early", early, LOOKS["stopped"]),
        ("front", best, ("#dd6b20", "circle-open")),
    ):
        figure.add_scatter(
            x=[row.metrics[first.name] for row in some],
            y=[row.metrics[second.name] for row in some],
            text=[f"trial {row.number}: {format_values(row.values)}" for row in some],
            mode="markers+lines" if name == "front" else "markers",
            marker={"color": colour, "symbol": symbol, "size": 14 if name == "front" else 9},
            name=name,
        )
    figure.update_layout(
        xaxis={"title": first.name, "exponentformat": "none"},
        yaxis={"title": second.name, "exponentformat": "none", "automargin": True},
    )
    return [
        SearchChart(
            f"{first.name} against {second.name}", figure, unlike(counted, epochs), wide=True
        )
    ]


def bars(weights: dict[str, float], epoch: int) -> SearchChart:
    """Importances, the largest on top."""
    names, shares = [short(field) for field in weights], list(weights.values())
    figure = go.Figure(
        go.Bar(
            x=shares[::-1], y=names[::-1], orientation="h", marker={"color": "#3b82c4"},
            text=[percent(share) for share in shares[::-1]], textposition="auto",
            outsidetextfont={"color": "#7d8794"},  # legible on light and on dark
        )
    )  # fmt: skip
    figure.update_layout(
        xaxis={"tickformat": ".0%", "title": "share of the differences"},
        yaxis={"automargin": True, "ticksuffix": " "},
        meta={"t": 8},
    )
    height = 90 + 26 * len(names)
    return SearchChart(
        f"What mattered after {count(epoch, 'epoch')}", figure, height=height, wide=True
    )


def parallel(
    rows: list[TrialResult], epoch: int, metric: SearchMetric, space: Space
) -> SearchChart:
    """Every trial as a line over its values; a field that has one value only is left out."""
    dimensions: list[dict[str, Any]] = []
    for field, parameter in space.parameters.items():
        values: list[Any] = [row.values.get(field) for row in rows]
        if None in values or len(set(values)) < 2:
            continue
        if parameter.kind == "choice":
            there = [choice for choice in parameter.ends() if choice in values]
            axis = {
                "values": [there.index(value) for value in values],
                "tickvals": list(range(len(there))),
                "ticktext": [str(choice) for choice in there],
            }
        elif parameter.kind == "int" and len(set(values)) <= 9:
            there = sorted(set(values))
            axis = {"values": values, "tickvals": there, "ticktext": [str(v) for v in there]}
        elif parameter.kind == "log":
            axis = values_between([math.log10(value) for value in values], lambda v: number(10**v))
        else:
            axis = values_between(values, number)
        dimensions.append({"label": short(field), **axis})
    scores = [row.history[epoch] for row in rows]
    dimensions.append({"label": metric.name, **values_between(scores, number)})
    line = {"color": scores, "colorscale": "Viridis", "reversescale": not metric.larger}
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions))
    room = LETTER * max(len(str(axis["label"])) for axis in dimensions) + 12
    side = max(room / 2, 56)
    figure.update_layout(meta={"t": 44, "l": side, "r": side, "b": 20})
    return SearchChart(
        f"Trials after {count(epoch, 'epoch')}, the better the brighter",
        figure,
        "A line is a trial. Draw along an axis to see only the trials that pass there.",
        width=round(2 * side + max(room, 72) * (len(dimensions) - 1)),
        wide=True,
    )


def map_of(
    rows: list[TrialResult], epoch: int, metric: SearchMetric, space: Space, across: str, up: str
) -> SearchChart:
    """Two fields against each other, each trial a point in the colour of its figure.

    Contours are drawn between the points where these are ten or more.
    """
    rows = [row for row in rows if across in row.values and up in row.values]
    x, y = ([row.values[f] for row in rows] for f in (across, up))
    scores = [row.history[epoch] for row in rows]
    scale = {"colorscale": "Viridis", "reversescale": not metric.larger}
    figure = go.Figure()
    if len(rows) >= FEWEST:
        # Contours are drawn over what is shown: a logarithmic axis takes the values themselves.
        figure.add_contour(
            x=x,
            y=y,
            z=scores,
            connectgaps=True,
            opacity=0.5,
            showscale=False,
            contours={"coloring": "heatmap"},
            **scale,
        )
    figure.add_scatter(
        x=x, y=y, mode="markers", showlegend=False, cliponaxis=False,
        text=[f"trial {r.number}: {number(s)}" for r, s in zip(rows, scores, strict=True)],
        marker={
            "size": 13, "color": scores, "showscale": True, **scale,
            "colorbar": legend(metric), "line": {"width": 1, "color": "black"},
        },
    )  # fmt: skip
    axes = []
    for field in (across, up):
        parameter = space.parameters.get(field)
        axis: dict[str, Any] = {"title": short(field), "exponentformat": "none", "automargin": True}
        if parameter and parameter.kind == "log":
            axis |= logarithmic(short(field), *parameter.ends())
        elif parameter and parameter.kind != "choice":
            axis["range"] = parameter.ends()
        axes.append(axis)
    figure.update_layout(xaxis=axes[0], yaxis=axes[1])
    few = f"Fewer than {FEWEST} trials: the points alone, no lines between them."
    return SearchChart(
        f"{short(across)} against {short(up)} after {count(epoch, 'epoch')}",
        figure,
        "" if len(rows) >= FEWEST else few,
    )


def grid_of(
    rows: list[TrialResult], epoch: int, metric: SearchMetric, space: Space, across: str, up: str
) -> SearchChart:
    """Two whole-number fields against each other, each cell the best figure of its trials."""
    cells: dict[tuple[Any, Any], list[float]] = {}
    for row in rows:
        if across in row.values and up in row.values:
            place = row.values[across], row.values[up]
            cells.setdefault(place, []).append(row.history[epoch])
    choose = max if metric.larger else min
    xs, ys = (sorted({place[axis] for place in cells}) for axis in (0, 1))
    table = [[choose(cells[x, y]) if (x, y) in cells else None for x in xs] for y in ys]
    words = [
        [
            f"{number(choose(cells[x, y]))} (of {len(cells[x, y])})" if (x, y) in cells else ""
            for x in xs
        ]
        for y in ys
    ]
    figure = go.Figure(
        go.Heatmap(
            x=[str(x) for x in xs],
            y=[str(y) for y in ys],
            z=table,
            text=words,
            texttemplate="%{text}",
            colorscale="Viridis",
            reversescale=not metric.larger,
            colorbar=legend(metric),
        )
    )
    figure.update_layout(
        xaxis={"title": short(across), "type": "category"},
        yaxis={"title": short(up), "type": "category", "automargin": True},
    )
    after = count(epoch, "epoch")
    return SearchChart(
        f"{short(across)} against {short(up)} after {after}: the best of each",
        figure,
        "In brackets, of how many trials.",
    )


def unlike(rows: list[TrialResult], epochs: int) -> str:
    """A sentence where the trials' metrics are not all of as many epochs."""
    if not any(row.status == "stopped" and row.epoch < epochs for row in rows):
        return ""
    return (
        "A trial that was stopped early has a figure of fewer epochs than one that went on for "
        f"{epochs}: the one does not compare with the other."
    )


def lengths(rows: list[TrialResult]) -> str:
    """1 epoch, or 1 to 3 epochs."""
    low, high = min(row.epoch for row in rows), max(row.epoch for row in rows)
    return count(low, "epoch") if low == high else f"{low} to {count(high, 'epoch')}"


def is_log(metric: SearchMetric, rows: list[TrialResult]) -> bool:
    """Whether the metrics are shown on a logarithmic axis: distances are."""
    return not metric.larger and bool(rows) and min(r.metrics[metric.name] for r in rows) > 0


def tick_step(trials: int) -> int:
    """Trials from one mark to the next: a whole number, of which ten or fewer are needed."""
    rough = max(trials - 1, 1) / 10
    power = 10 ** max(math.ceil(math.log10(rough)) - 1, 0)
    return next(power * m for m in (1, 2, 5, 10) if power * m >= rough)


def marks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times the powers of ten from `low` to `high`, or where these are many, 1 only."""
    powers = range(math.floor(math.log10(low)) - 1, math.ceil(math.log10(high)) + 1)
    several = (1, 2, 5) if high / low < 1000 else (1,)
    found = [float(f"{m}e{power}") for power in powers for m in several]
    return [mark for mark in found if low * 0.999 <= mark <= high * 1.001]


def logarithmic(name: str, low: float, high: float) -> dict[str, Any]:
    """An axis from `low` to `high`, its marks plain numbers."""
    at = marks(low, high)
    at = at if len(at) > 1 else [low, high]
    return {
        "title": name,
        "type": "log",
        "range": [math.log10(low), math.log10(high)],
        "tickvals": at,
        "ticktext": [number(mark) for mark in at],
    }


def around(name: str, values: list[float]) -> dict[str, Any]:
    """A logarithmic axis that ends at the marks around the values, so that all lie between two."""
    wide = marks(min(values) / 10, max(values) * 10)
    low = max(mark for mark in wide if mark < min(values))
    high = min(mark for mark in wide if mark > max(values))
    return logarithmic(name, low, high)


def values_between(values: list[float], form: Callable[[float], str]) -> dict[str, Any]:
    """A parallel axis with marks at both ends and in the middle."""
    low, high = min(values), max(values)
    at = [low, (low + high) / 2, high] if high > low else [low]
    return {"values": values, "tickvals": at, "ticktext": [form(v) for v in at]}


def legend(metric: SearchMetric) -> dict[str, Any]:
    """What the colours mean."""
    return {"title": metric.name, "exponentformat": "none", "thickness": 12}
