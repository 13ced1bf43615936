"""The report of a run: one HTML page with its images, charts and metrics."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import jinja2
from plotly.offline import get_plotlyjs

from cl_ray.config import Config, differences, preset
from cl_ray.data.dataset import Dataset, sample_rows
from cl_ray.errors import UserError, first_error_line, printable
from cl_ray.metrics_file import read_epochs
from cl_ray.model import TrainedModel, load
from cl_ray.report import galleries
from cl_ray.report.charts import PALETTE
from cl_ray.report.curves import evaluation_charts, loss_balance, training_charts
from cl_ray.report.embedding import MAX_IMAGES, EmbeddingPlot, plot_embedding, write_projector
from cl_ray.report.images import epoch_strip, last_pairs, saved_epochs
from cl_ray.report.records import read_curves, read_record
from cl_ray.report.summary import (
    fidelity_rows,
    headline,
    headline_stats,
    representation_table,
    run_details,
)
from cl_ray.storage import RunStorage
from cl_ray.uri import redact

_FILE = "report.html"
_MAX_STRIP_EPOCHS, _STRIP_COLUMNS = 12, 10
_HIDDEN = ("name", "storage", "preset")
"""Fields that differ from the preset's in every run."""

_T = TypeVar("_T")


@dataclass(frozen=True)
class Report:
    """A report that was written.

    Args:
        location: The page's path, or its URI without credentials.
        missing: A sentence for each part that could not be made.
        projector: Whether TensorBoard's projector has the embeddings.
    """

    location: str
    bytes: int
    missing: list[str]
    projector: bool


def write_run_report(
    where: str | Path, checkpoint: str = "last", device: str = "auto", projector: bool = True
) -> Report:
    """Write `report.html` into a run folder, and the embeddings for TensorBoard's projector.

    Parts for which something is missing (no checkpoint yet, no evaluation, data that cannot be
    reached) say so on the page in a sentence.

    Args:
        where: The run folder's path or URI.
        checkpoint: Which networks are shown: `last`, `best` or a checkpoint's name.
        device: Where they compute: `auto`, `cpu`, `cuda` or `mps`.
        projector: Whether to write the embeddings.

    Raises:
        UserError: There is no run folder or no checkpoint of that name, or the page cannot be
            written.
    """
    folder = RunStorage.existing(where)
    missing: dict[str, str] = {}
    text = (folder.read("config.yaml") or b"").decode(errors="replace")
    config = _try(missing, "config", lambda: Config.from_run_yaml(text, f"{folder}/config.yaml"))
    try:
        run = load(where, checkpoint, device)
    except UserError as error:
        if checkpoint != "last":
            raise
        run, missing["networks"] = None, str(error)
    dataset = None
    if config and run:
        dataset = _try(missing, "data", partial(_open_data, config, run))
    shown = _show_networks(run, dataset, missing)
    embedding: EmbeddingPlot | None = shown["embedding"]
    is_written = False
    if projector and run and embedding:
        try:
            write_projector(folder, run.step, embedding)
            is_written = True
        except OSError as error:
            raise UserError(
                f"The embeddings cannot be written into {folder}/tensorboard "
                f"({first_error_line(error)}): leave them out with --no-projector."
            ) from error
    summary = read_record(folder, "summary.json")
    evaluation = read_record(folder, "evaluation.json") or {}
    epochs = _try(missing, "metrics", lambda: read_epochs(folder)) or []
    curves = read_curves(folder)
    epoch_ends = [int(line["step"]) for line in epochs]
    parts = {name: evaluation.get(name) or {} for name in ("fidelity", "modes", "representation")}
    context: dict[str, Any] = {
        "name": folder.name.partition("?")[0],
        "folder": str(folder),
        "command": shlex.quote(str(folder)),
        "config": config,
        "yaml": redact(text),
        "changed": _changed_fields(config),
        "epochs": epochs,
        "run": run,
        "dataset": dataset,
        "evaluation": evaluation,
        "supervision": run.supervision if run else config.supervision if config else "",
        "headline": headline(config, summary, epochs, run),
        "stats": headline_stats(evaluation, summary, epochs),
        "details": run_details(summary, epochs),
        "strip": epoch_strip(folder, _MAX_STRIP_EPOCHS, _STRIP_COLUMNS),
        "epochs_saved": len(saved_epochs(folder, "samples")),
        "pairs": last_pairs(folder),
        "curves": training_charts(curves, epoch_ends),
        "balance": loss_balance(curves, epoch_ends, config),
        "progress": evaluation_charts(epochs),
        "fidelity": parts["fidelity"],
        "fidelity_rows": fidelity_rows(parts["fidelity"]),
        "modes": parts["modes"],
        "mode_rows": fidelity_rows(parts["modes"]),
        "representation": representation_table(parts["representation"]),
        "projector": is_written,
        "missing": missing,
        **shown,
    }
    size = write_page(folder, render_page("page.html", context))
    return Report(f"{folder}/{_FILE}", size, list(missing.values()), is_written)


def render_page(template: str, context: dict[str, Any], package: str = "cl_ray.report") -> str:
    """Render a page that needs no other file.

    Args:
        template: File of a template that extends `base.html`.
        context: What the template names; a name without a value is an error.
        package: Package whose folder `templates` has it.
    """
    packages = dict.fromkeys((package, "cl_ray.report"))
    environment = jinja2.Environment(
        loader=jinja2.ChoiceLoader([jinja2.PackageLoader(name) for name in packages]),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: printable(value, keep="\n") if type(value) is str else value,
    )
    made = f"{datetime.now():%-d %B %Y, %H:%M}"
    page = environment.get_template(template)
    return page.render({"made": made, "palette": PALETTE, "plotly_js": get_plotlyjs(), **context})


def write_page(folder: RunStorage, page: str) -> int:
    """Write report.html and return its size in bytes.

    Raises:
        UserError: It cannot be written.
    """
    blob = page.encode()
    try:
        folder.write(_FILE, blob)
    except OSError as error:
        raise UserError(
            f"{folder}/{_FILE} cannot be written ({len(blob):,} bytes): {first_error_line(error)}."
        ) from error
    return len(blob)


def _open_data(config: Config, run: TrainedModel) -> Dataset:
    dataset = Dataset.open(config.data)
    if dataset.info.shape != run.shape:
        raise UserError(
            f"{config.data} now holds images of {dataset.info.shape}, and the "
            f"run was trained on {run.shape}."
        )
    return dataset


def _show_networks(
    run: TrainedModel | None, dataset: Dataset | None, missing: dict[str, str]
) -> dict[str, Any]:
    """Return what the networks show, by its name in the template; None where it cannot be made."""
    of_run = ("samples", "class_grids", "noise_interpolation")
    of_data = ("image_interpolation", "neighbours", "embedding")
    shown: dict[str, Any] = dict.fromkeys((*of_run, *of_data))
    if run is None:
        return shown
    shown["samples"] = galleries.sample_grids(run)
    shown["class_grids"] = galleries.class_grids(run)
    shown["noise_interpolation"] = galleries.noise_interpolation(run)
    if dataset is None:
        return shown
    split = next(s for s in ("test", "validation", "train") if s in dataset.info.splits)
    rows = _try(missing, "data", lambda: sample_rows(dataset, split, MAX_IMAGES, galleries.SEED))
    if rows is None:
        return shown
    interpolate = partial(galleries.image_interpolation, run, rows)
    shown["image_interpolation"] = _try(missing, "interpolation", interpolate)
    held_out = rows if split != "train" else None
    find = partial(galleries.nearest_training_images, run, dataset, held_out)
    shown["neighbours"] = _try(missing, "data", find)
    plot = partial(plot_embedding, run, dataset, rows, split)
    shown["embedding"] = _try(missing, "embedding", plot)
    return shown


def _changed_fields(config: Config | None) -> list[tuple[str, Any, Any]]:
    if config is None:
        return []
    found = differences(preset(config.preset), config)
    return [(name, old, new) for name, (old, new) in found.items() if name not in _HIDDEN]


def _try(missing: dict[str, str], part: str, make: Callable[[], _T]) -> _T | None:
    """Return what `make` returns; on a UserError, None, with its sentence in `missing`."""
    try:
        return make()
    except UserError as error:
        missing[part] = str(error)
        return None
