"""`report`: everything that is there of a run on one HTML page, and what is not, said so."""

import shlex
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from cl_ray.config import Config, differences, preset
from cl_ray.data.dataset import Dataset, RowBatch, first_error_line
from cl_ray.errors import UserError, redact_credentials
from cl_ray.model import TrainedModel, load
from cl_ray.report import galleries
from cl_ray.report.balance import curve_charts, evaluation_charts, loss_balance, on_fewer
from cl_ray.report.pictures import pairs, saved_epochs, strip
from cl_ray.report.projector import write_projector
from cl_ray.report.records import read_curves, read_epochs, read_record
from cl_ray.report.render import render
from cl_ray.report.summary import headline, headline_stats, how_it_went
from cl_ray.report.tables import fidelity_rows, representation_table
from cl_ray.storage import RunStorage

FILE = "report.html"
STRIP = 12
"""Epochs of which samples are shown, at most."""
STRIP_COLUMNS = 10
PAIR_COLUMNS = 8
HIDDEN = ("name", "storage", "preset")
"""Fields that differ from the preset's in every run."""

T = TypeVar("T")


@dataclass(frozen=True)
class Report:
    """What was written.

    Args:
        location: The page's path, or its URI without keys.
        bytes: Its size.
        missing: A sentence for each part that the run has nothing for.
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

    Parts that need what is not there (no checkpoint yet, no evaluation, data that cannot be
    reached) say so on the page in a sentence.

    Args:
        where: The run folder's path or URI.
        checkpoint: Whose networks are shown: `last`, `best` or a checkpoint's name.
        device: Where they compute: `auto`, `cpu`, `cuda` or `mps`.
        projector: Whether to write the embeddings.

    Returns:
        Where the page lies, and what it lacks.

    Raises:
        UserError: There is no run folder, no checkpoint of the name that was given, or the page
            cannot be written.
    """
    folder = RunStorage.of_run(where)
    missing: dict[str, str] = {}
    text = (folder.read("config.yaml") or b"").decode(errors="replace")
    config = _try(missing, "config", lambda: Config.from_yaml(text, f"{folder}/config.yaml"))
    try:
        run = load(where, checkpoint, device)
    except UserError as error:
        if checkpoint != "last":
            raise
        run, missing["networks"] = None, redact_credentials(str(error))
    dataset = None
    if config and run:
        dataset = _try(missing, "data", partial(_data, config, run))
    summary, evaluation = (
        read_record(folder, "summary.json"),
        read_record(folder, "evaluation.json"),
    )
    lines = read_epochs(folder)
    found = read_curves(folder, lines)
    ends = [int(line["step"]) for line in lines]
    shown = _networks(run, dataset, missing)
    there = saved_epochs(folder, "samples")
    mapped: galleries.EmbeddingPlot | None = shown.get("map")
    written = bool(projector and run and mapped)
    if written and run and mapped:
        try:
            write_projector(
                folder, run.step, mapped.components, mapped.rows, mapped.labels, mapped.split
            )
        except OSError as error:
            raise UserError(
                f"The embeddings cannot be written into {folder}/tensorboard "
                f"({first_error_line(error)}): leave them out with --no-projector."
            ) from error
    fidelity = (evaluation or {}).get("fidelity") or {}
    modes = (evaluation or {}).get("modes") or {}
    representation = (evaluation or {}).get("representation") or {}
    context: dict[str, Any] = {
        "name": folder.name.partition("?")[0],
        "folder": str(folder),
        "command": shlex.quote(str(folder)),
        "made": f"{datetime.now():%-d %B %Y, %H:%M}",
        "config": config,
        "yaml": redact_credentials(text),
        "changed": _changed(config),
        "summary": summary,
        "lines": lines,
        "run": run,
        "dataset": dataset,
        "evaluation": evaluation,
        "words": headline(config, summary, lines, run),
        "tiles": headline_stats(evaluation, summary, lines),
        "went": how_it_went(summary, lines),
        "strip": strip(folder, STRIP, STRIP_COLUMNS),
        "epochs_saved": len(there),
        "pairs": pairs(folder, PAIR_COLUMNS),
        "curves": curve_charts(found, ends),
        "balance": loss_balance(found, ends, config),
        "progress": evaluation_charts(lines),
        "fewer": on_fewer(config, evaluation),
        "fidelity": fidelity,
        "fidelity_rows": fidelity_rows(fidelity),
        "modes": modes,
        "mode_rows": fidelity_rows(modes),
        "representation": representation_table(representation),
        "projector": written,
        "missing": missing,
        **shown,
    }
    blob = render("page.html", context).encode()
    try:
        folder.write(FILE, blob)
    except OSError as error:
        raise UserError(
            f"{folder}/{FILE} cannot be written ({len(blob):,} bytes): {first_error_line(error)}."
        ) from error
    return Report(f"{folder}/{FILE}", len(blob), list(missing.values()), written)


def _data(config: Config, run: TrainedModel) -> Dataset:
    dataset = Dataset.open(config.data)
    if dataset.info.shape != run.shape:
        raise UserError(
            f"{redact_credentials(config.data)} now holds images of {dataset.info.shape}, and the run "
            f"was trained on {run.shape}."
        )
    return dataset


def _networks(
    run: TrainedModel | None, dataset: Dataset | None, missing: dict[str, str]
) -> dict[str, Any]:
    """What the networks show, by the names that the page has for it; None for what they cannot."""
    shown: dict[str, Any] = dict.fromkeys(
        ("samples", "by_class", "noise_ways", "image_ways", "neighbours", "map")
    )
    if run is None:
        return shown
    shown["samples"] = galleries.samples(run)
    shown["by_class"] = galleries.by_class(run)
    shown["noise_ways"] = galleries.ways_of_noise(run)
    if dataset is None:
        return shown
    split = "test" if "test" in dataset.info.splits else "train"
    rows: RowBatch | None = _try(missing, "data", lambda: galleries.images_to_show(dataset, split))
    if rows is None:
        return shown
    shown["image_ways"] = galleries.ways_of_images(run, rows)
    test = rows if split == "test" else None
    shown["neighbours"] = _try(
        missing, "data", lambda: galleries.nearest_training_images(run, dataset, test)
    )
    shown["map"] = galleries.plot_embedding(run, dataset, rows, split)
    if shown["map"] is None:
        missing["map"] = f"{len(rows.id)} images are too few for a map."
    return shown


def _changed(config: Config | None) -> list[tuple[str, Any, Any]]:
    if config is None:
        return []
    found = differences(preset(config.preset), config)
    return [(k, old, new) for k, (old, new) in found.items() if k not in HIDDEN]


def _try(missing: dict[str, str], part: str, make: Callable[[], T]) -> T | None:
    """What `make` returns, or None and why."""
    try:
        return make()
    except UserError as error:
        missing[part] = redact_credentials(str(error))
        return None
