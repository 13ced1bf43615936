"""The charts of a search, by optuna.visualization in the theme of the report."""

import warnings
from collections.abc import Callable

import optuna
import plotly.graph_objects as go
from optuna import visualization
from optuna.trial import TrialState, create_trial

from cl_ray.errors import pluralize
from cl_ray.report.charts import COLOURS, Chart
from cl_ray.tuning import importance
from cl_ray.tuning.leaderboard import short_names
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import SearchMetric, TrialResult

DEPTHS = ("generator.depth", "discriminator.depth")


def history_charts(
    results: list[TrialResult], metrics: list[SearchMetric], space: Space
) -> list[Chart]:
    """Draw the metric by trial, by epoch, and the Pareto front of the first two metrics."""
    metric = metrics[0]
    if not any(result.is_valid and metric.name in result.metrics for result in results):
        return []
    study = _results_study(results, metrics[:1], space)
    history = _draw(visualization.plot_optimization_history, study, target_name=metric.name)
    curves = _draw(visualization.plot_intermediate_values, study)
    epochs = max(max(result.history, default=1) for result in results)
    ticks = {"title": "epoch", "dtick": max(1, round(epochs / 10))}
    curves.update_layout(showlegend=False, xaxis=ticks, yaxis={"title": metric.name})
    for figure in (history, curves):
        if not metric.maximize and _all_positive(figure):
            figure.update_yaxes(type="log")
    missing = [r.status for r in results if not r.is_valid]
    ends = ", ".join(f"{missing.count(end)} {end}" for end in sorted({*missing}))
    note = f"Without a value: {ends}." if ends else ""
    alt = "a point is a trial"
    charts = [
        _chart(f"{metric.name} of the finished trials", alt, history, note, wide=True),
        _chart(
            f"{metric.name} by epoch",
            "a line is a trial",
            curves,
            "Trials that were stopped early end before the last epoch. A metric after fewer epochs "
            "cannot be compared with one after more.",
            wide=True,
        ),
    ]
    if len(metrics) > 1:
        pair = metrics[:2]
        front = _draw(
            visualization.plot_pareto_front,
            _results_study(results, pair, space),
            target_names=[m.name for m in pair],
        )
        # Optuna colours by number, on scales that are dark on dark.
        for trace, colour in zip(front.data, ("g", "d"), strict=False):
            trace.update(marker={"color": COLOURS[colour], "size": 9, "showscale": False})
        front.update_traces(showlegend=True)
        title = f"Pareto front of {pair[0].name} and {pair[1].name}"
        charts.append(_chart(title, alt, front, wide=True))
    return charts


def importance_chart(
    results: list[TrialResult], epoch: int, metric: SearchMetric, space: Space
) -> Chart:
    """Draw the importances of comparable trials, the largest on top."""
    study = importance.comparable_study(results, epoch, metric, space)
    figure = _draw(
        visualization.plot_param_importances,
        study,
        evaluator=importance.importance_evaluator(),
        target_name=metric.name,
    )
    figure.update_layout(
        xaxis={"title": "fraction of the variance", "tickformat": ".0%"},
        yaxis={"title": ""},
        showlegend=False,
        margin={"r": 40},
    )
    figure.update_traces(texttemplate="%{x:.0%}", cliponaxis=False)
    height = 90 + 26 * len(study.trials[0].params)
    title = f"Importances for {metric.name} after {pluralize(epoch, 'epoch')}"
    return _chart(title, "a bar is a field", figure, height=height, wide=True)


def value_charts(
    results: list[TrialResult], epoch: int, metric: SearchMetric, space: Space
) -> list[Chart]:
    """Draw the values of comparable trials: parallel coordinates, and contours of ten or more."""
    if len(results) < 2:
        return []
    study = importance.comparable_study(results, epoch, metric, space)
    after = f"after {pluralize(epoch, 'epoch')}"
    charts = []
    parameters = study.trials[0].params
    if parameters:
        figure = _draw(visualization.plot_parallel_coordinate, study, target_name=metric.name)
        _fade_worse_trials(figure, metric)
        charts.append(
            _chart(
                f"Values and {metric.name} {after}",
                "a line is a trial",
                figure,
                "The better a trial, the stronger its line.",
                min_width=90 * (len(parameters) + 2),
                wide=True,
            )
        )
    short = short_names(space.parameters)
    for pair in (importance.RATES, DEPTHS):
        names = [short.get(field, field) for field in pair]
        if len(results) >= importance.MIN_COMPARABLE and all(name in parameters for name in names):
            figure = _draw(visualization.plot_contour, study, params=names, target_name=metric.name)
            if pair == DEPTHS:
                figure.update_layout(xaxis={"dtick": 1}, yaxis={"dtick": 1})
            title = f"{metric.name} by {names[0]} and {names[1]} {after}"
            charts.append(_chart(title, "a point is a trial", figure))
    return charts


def _results_study(
    results: list[TrialResult], metrics: list[SearchMetric], space: Space
) -> optuna.Study:
    """Build an in-memory study of all trials under their own numbers; no value means failed.

    For a single metric stopped trials are pruned ones, unless no trial has finished.
    """
    study = optuna.create_study(directions=[metric.direction for metric in metrics])
    is_finished = any(result.status == "finished" for result in results)
    by_number = {result.number: result for result in results}
    names = {metric.name for metric in metrics}
    for number in range(max(by_number, default=-1) + 1):
        result = by_number.get(number)
        if result is None or not result.is_valid or not names <= result.metrics.keys():
            study.add_trial(create_trial(state=TrialState.FAIL))
            continue
        fields = [f for f, value in result.values.items() if space.contains({f: value})]
        is_complete = result.status == "finished" or not is_finished or len(metrics) > 1
        values = [result.metrics[metric.name] for metric in metrics] if is_complete else None
        study.add_trial(importance.frozen_trial(result, fields, space, values))
    return study


def _draw(plot: Callable[..., go.Figure], study: optuna.Study, **options: object) -> go.Figure:
    """Draw a figure of Optuna's; some warn that they are experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return plot(study, **options)


def _fade_worse_trials(figure: go.Figure, metric: SearchMetric) -> None:
    """Show the metric of parallel coordinates by opacity: Optuna's colours are dark on dark."""
    for trace in figure.data:
        if getattr(trace, "mode", None) == "lines":
            score = trace.y[0] if metric.maximize else 1 - trace.y[0]  # 0 to 1, the first axis
            trace.update(line={"color": COLOURS["g"], "width": 2}, opacity=0.1 + 0.9 * score)
        elif getattr(trace, "mode", None) == "markers":  # has the colour bar
            trace.marker.showscale = False
    figure.layout.plot_bgcolor = None
    figure.update_annotations(font={"color": COLOURS["quiet"]})


def _all_positive(figure: go.Figure) -> bool:
    values = [y for trace in figure.data for y in (trace.y if trace.y is not None else ())]
    return bool(values) and min(values) > 0


def _chart(
    title: str,
    what: str,
    figure: go.Figure,
    note: str = "",
    height: int = 380,
    min_width: int = 0,
    wide: bool = False,
) -> Chart:
    return Chart(title, f"{title}: {what}.", figure, note, height, min_width, wide)
