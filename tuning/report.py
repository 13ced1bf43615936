"""report.html: which balance works, and what mattered; one file that needs no network."""

import base64
import html
import statistics
import warnings
from typing import Any

import optuna

from tuning.leaderboard import best_of, front, in_words, ranked, short
from tuning.prepare import Search, lacking
from tuning.space import Space
from tuning.study import Metric, Row

RATES = ("optimizer.lr_g", "optimizer.lr_d")
DEPTHS = ("generator.depth", "discriminator.depth")
COLOURS = {
    "finished": "#2b6cb0",
    "stopped": "#a0aec0",
    "diverged": "#c53030",
    "collapsed": "#dd6b20",
    "failed": "#000000",
    "running": "#38a169",
}
FEWEST = 4
"""Trials without which nothing can be said of what mattered."""

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<style>body{{font:16px/1.5 system-ui,sans-serif;max-width:1100px;margin:2em auto;padding:0 1em}}
table{{border-collapse:collapse;font-size:14px}}td,th{{padding:.2em .7em;text-align:right}}
img{{width:48%;image-rendering:pixelated}}figure{{margin:0}}.dim{{color:#888}}</style>
<h1>{title}</h1>{body}</html>"""


def write_report(search: Search, rows: list[Row]) -> str | None:
    """Write report.html.

    Returns:
        One sentence on what mattered; None where plotly is not there.
    """
    if lacking():
        return None
    metric = search.metrics[0]
    alike, epoch = comparable(rows)
    weights = importances(alike, epoch, metric, search.space)
    sentence = what_mattered(alike, epoch, metric, weights)
    parts = [f"<p><b>{html.escape(sentence)}</b></p>"]
    charts = [history(rows, metric), *pareto(rows, search.metrics)]
    if weights:
        charts.append(bars(weights, epoch))
    charts += [parallel(alike, epoch, metric, search.space)] if len(alike) > 1 else []
    charts += [
        chart(alike, epoch, metric, search.space, *pair)
        for chart, pair in ((map_of, RATES), (grid_of, DEPTHS))
        if sum(all(field in row.values for field in pair) for row in alike) > 1
    ]
    first = True
    for figure in charts:
        figure.update_layout(template="plotly_white", margin={"t": 60})
        parts.append(figure.to_html(full_html=False, include_plotlyjs=first))
        first = False
    parts += [pictures(search, rows), leaderboard(search, rows)]
    page = PAGE.format(title=f"Search {html.escape(search.name)}", body="\n".join(parts))
    search.folder.write("report.html", page.encode())
    return sentence


def comparable(rows: list[Row]) -> tuple[list[Row], int]:
    """Trials at the latest epoch that at least half of those that count have reached.

    Figures after one epoch and after ten are not compared with each other.
    """
    counted = [row for row in rows if row.counts and row.history]
    enough = max(FEWEST, len(counted) / 2)
    epochs = sorted({epoch for row in counted for epoch in row.history}, reverse=True)
    for epoch in epochs:
        alike = [row for row in counted if epoch in row.history]
        if len(alike) >= enough:
            return alike, epoch
    return [row for row in counted if epochs and epochs[-1] in row.history], (epochs or [0])[-1]


def importances(rows: list[Row], epoch: int, metric: Metric, space: Space) -> dict[str, float]:
    """What share of the figure's variance each field explains (fANOVA: Hutter et al., 2014)."""
    fields = [f for f in space.parameters if all(f in row.values for row in rows)]
    fields = [f for f in fields if len({row.values[f] for row in rows}) > 1]
    if len(rows) < FEWEST or not fields or len({r.history[epoch] for r in rows}) < 2:
        return {}
    study = optuna.create_study(direction="maximize" if metric.larger else "minimize")
    ranges = {field: space.parameters[field].distribution() for field in fields}
    for row in rows:
        values = {field: row.values[field] for field in fields}
        study.add_trial(
            optuna.trial.create_trial(params=values, distributions=ranges, value=row.history[epoch])
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        evaluator = optuna.importance.FanovaImportanceEvaluator(seed=0)
        found = optuna.importance.get_param_importances(study, evaluator=evaluator)
    return {field: float(weight) for field, weight in found.items()}


def what_mattered(rows: list[Row], epoch: int, metric: Metric, weights: dict[str, float]) -> str:
    """One sentence."""
    if not weights:
        return f"{len(rows)} trials are too few to say what mattered."
    order = sorted(rows, key=lambda r: r.history[epoch], reverse=metric.larger)
    good = order[: max(2, len(order) // 4)]
    told = []
    for field, weight in list(weights.items())[:3]:
        values = [row.values[field] for row in good]
        if all(isinstance(v, int | float) and not isinstance(v, bool) for v in values):
            typical = f"{statistics.median(values):.3g}"
        else:
            typical = str(statistics.mode(values))
        told.append(f"{short(field)} ({weight:.0%} of the differences; {typical} among the best)")
    ratio = ""
    if all(rate in row.values for rate in RATES for row in good):
        middle = statistics.median(r.values[RATES[1]] / r.values[RATES[0]] for r in good)
        ratio = f" The best quarter trains D at {middle:.2g} times G's rate."
    return (
        f"Of {len(rows)} trials after {epoch} epochs, {metric.name} went by {', '.join(told)}."
        f"{ratio}"
    )


def history(rows: list[Row], metric: Metric) -> Any:
    """Each trial's figure in the order of the trials, and the best so far."""
    import plotly.graph_objects as go

    figure = go.Figure()
    for status, colour in COLOURS.items():
        some = [row for row in rows if row.status == status and metric.name in row.figures]
        if some:
            figure.add_scatter(
                x=[row.number for row in some],
                y=[row.figures[metric.name] for row in some],
                text=[in_words(row.values) for row in some],
                mode="markers",
                marker={"color": colour, "size": 9},
                name=status,
            )
    counted = [row for row in rows if row.counts]
    best: list[float] = []
    choose = max if metric.larger else min
    for row in counted:
        best.append(choose([row.figures[metric.name], *best[-1:]]))
    figure.add_scatter(
        x=[row.number for row in counted], y=best, mode="lines", name="best so far",
        line={"color": "#2b6cb0", "shape": "hv"},
    )  # fmt: skip
    log = not metric.larger and bool(best) and min(best) > 0
    return figure.update_layout(
        title=f"{metric.name} by trial",
        xaxis_title="trial",
        yaxis={"title": metric.name, "type": "log" if log else "linear"},
    )


def pareto(rows: list[Row], metrics: list[Metric]) -> list[Any]:
    """The front of two metrics, where there are two or more."""
    import plotly.graph_objects as go

    counted = [row for row in rows if row.counts]
    if len(metrics) < 2 or not counted:
        return []
    first, second = metrics[:2]
    best = sorted(front(counted, metrics), key=lambda r: r.figures[first.name])
    figure = go.Figure()
    for name, some, mode in (("trials", counted, "markers"), ("front", best, "markers+lines")):
        figure.add_scatter(
            x=[row.figures[first.name] for row in some],
            y=[row.figures[second.name] for row in some],
            text=[f"trial {row.number}: {in_words(row.values)}" for row in some],
            mode=mode,
            name=name,
        )
    return [
        figure.update_layout(
            title="Generation against representation",
            xaxis_title=first.name,
            yaxis_title=second.name,
        )
    ]


def bars(weights: dict[str, float], epoch: int) -> Any:
    """Importances, the largest on top."""
    import plotly.graph_objects as go

    names, shares = [short(field) for field in weights], list(weights.values())
    figure = go.Figure(go.Bar(x=shares[::-1], y=names[::-1], orientation="h"))
    return figure.update_layout(
        title=f"What mattered after {epoch} epochs", xaxis={"tickformat": ".0%"}
    )


def parallel(rows: list[Row], epoch: int, metric: Metric, space: Space) -> Any:
    """Every trial as a line over its values."""
    import math

    import plotly.graph_objects as go

    dimensions: list[dict[str, Any]] = []
    for field, parameter in space.parameters.items():
        if not all(field in row.values for row in rows):
            continue
        values: list[Any] = [row.values[field] for row in rows]
        if parameter.kind == "choice":
            choices = parameter.ends()
            dimension = {
                "values": [choices.index(value) for value in values],
                "tickvals": list(range(len(choices))),
                "ticktext": [str(choice) for choice in choices],
            }
        elif parameter.kind == "log":
            ticks = [math.log10(v) for v in (*parameter.ends(), *values)]
            ticks = [min(ticks), (min(ticks) + max(ticks)) / 2, max(ticks)]
            dimension = {
                "values": [math.log10(value) for value in values],
                "tickvals": ticks,
                "ticktext": [f"{10**tick:.2g}" for tick in ticks],
            }
        else:
            dimension = {"values": values}
        dimensions.append({"label": short(field), **dimension})
    scores = [row.history[epoch] for row in rows]
    dimensions.append({"label": metric.name, "values": scores})
    line = {"color": scores, "colorscale": "Viridis", "reversescale": not metric.larger}
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions))
    return figure.update_layout(title=f"Trials after {epoch} epochs, the better the brighter")


def map_of(rows: list[Row], epoch: int, metric: Metric, space: Space, across: str, up: str) -> Any:
    """Two fields against each other, each trial a point in the colour of its figure."""
    import math

    import plotly.graph_objects as go

    rows = [row for row in rows if across in row.values and up in row.values]
    logs = [f in space.parameters and space.parameters[f].kind == "log" for f in (across, up)]
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
        x=x, y=y, mode="markers", showlegend=False,
        text=[f"trial {r.number}: {s:.4g}" for r, s in zip(rows, scores, strict=True)],
        marker={
            "size": 13, "color": scores, "showscale": True, **scale,
            "colorbar": {"title": metric.name}, "line": {"width": 1, "color": "black"},
        },
    )  # fmt: skip
    ends = [space.parameters[f].ends() if f in space.parameters else None for f in (across, up)]
    axes = [
        {
            "title": short(field),
            "type": "log" if log else "linear",
            "range": [math.log10(v) if log else v for v in (end[0], end[-1])] if end else None,
        }
        for field, log, end in zip((across, up), logs, ends, strict=True)
    ]
    return figure.update_layout(
        title=f"{short(across)} against {short(up)} after {epoch} epochs",
        xaxis=axes[0],
        yaxis=axes[1],
    )


def grid_of(rows: list[Row], epoch: int, metric: Metric, space: Space, across: str, up: str) -> Any:
    """Two whole-number fields against each other, each cell the best figure of its trials."""
    import plotly.graph_objects as go

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
            f"{choose(cells[x, y]):.3g} (of {len(cells[x, y])})" if (x, y) in cells else ""
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
        )
    )
    return figure.update_layout(
        title=f"{short(across)} against {short(up)} after {epoch} epochs: the best of each",
        xaxis={"title": short(across), "type": "category"},
        yaxis={"title": short(up), "type": "category"},
    )


def pictures(search: Search, rows: list[Row]) -> str:
    """What the best and the worst trial make of the same noise."""
    best = best_of(rows, search.metrics)
    order = [row for row in ranked(rows, search.metrics) if row.epoch]
    shown = []
    for name, row in (("best", best), ("worst", order[-1] if len(order) > 1 else None)):
        for epoch in range(row.epoch if row else 0, 0, -1):
            assert row is not None
            file = f"{row.number:04d}/samples/samples-{epoch:04d}.png"
            image = search.trials.read(file)
            if image:
                code = base64.b64encode(image).decode()
                title = f"the {name}, trial {row.number} ({row.status}), after epoch {epoch}"
                shown.append(f"<img src='data:image/png;base64,{code}' title='{title}'>")
                shown.append(f"<figcaption>{title}</figcaption>")
                break
    return f"<h2>What the best and the worst make of noise</h2><figure>{''.join(shown)}</figure>"


def leaderboard(search: Search, rows: list[Row]) -> str:
    """All trials, the best first."""
    fields = list(search.space.parameters)
    names = [m.name for m in search.metrics]
    head = ["trial", "state", "epoch", *names, *map(short, fields), ""]
    lines = []
    for row in ranked(rows, search.metrics):
        scores = [f"{row.figures[n]:.4g}" if n in row.figures else "–" for n in names]
        values = [row.values.get(field, "–") for field in fields]
        plain = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in values]
        cells = [str(row.number), row.status, str(row.epoch), *scores, *plain, row.reason]
        style = "" if row.counts else " class=dim"
        lines.append(f"<tr{style}>{''.join(f'<td>{html.escape(c)}</td>' for c in cells)}</tr>")
    top = "".join(f"<th>{html.escape(h)}</th>" for h in head)
    return f"<h2>All trials</h2><table><tr>{top}</tr>{''.join(lines)}</table>"
