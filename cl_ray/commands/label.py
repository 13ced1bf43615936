"""`cl-ray label`: predict the labels of unlabelled training images from few labelled ones."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from pydantic import Field

from cl_ray.base_config import BaseConfig
from cl_ray.cli import RunPath, parse_flags
from cl_ray.commands.data import LISTED_CLASSES, DatasetProgress, print_dataset_summary
from cl_ray.config import Device
from cl_ray.console import PlainConsole, print_line
from cl_ray.errors import UserError, pluralize


class LabelCommand(BaseConfig):
    """Write a copy of a dataset in which training images without a label have a predicted one."""

    run: RunPath = Field(min_length=1, description="Run folder or its URI.")
    out: str = Field(min_length=1, description="Folder or URI that the dataset is written to.")
    data: str | None = Field(
        None,
        min_length=1,
        description="Dataset whose labels are completed; None is what the run was trained on.",
    )
    count: int | None = Field(
        None,
        ge=1,
        description="Labels to predict from, drawn as many of each class as possible, to try what "
        "so few are worth; the others are hidden and then compared with. None: all that there are.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the draw of these labels.")
    confidence: float = Field(
        0.0,
        ge=0,
        le=1,
        description="Images whose predicted class has a smaller part of the spread labels stay "
        "without a label.",
    )
    checkpoint: str = Field("last", description="`last`, `best` or a checkpoint's name.")
    device: Device = Field("auto", description="Where D computes.")
    overwrite: bool = Field(False, description="Replace the dataset at `out`.")


def command(arguments: Sequence[str]) -> None:
    """Run the command."""
    asked = parse_flags(LabelCommand, arguments, prog="cl-ray label")
    from cl_ray.data.dataset import UNLABELLED, Dataset, counts_by_label, open_dataset_location
    from cl_ray.data.partition import TRAIN_SPLIT, draw_labelled_ids
    from cl_ray.data.writer import check_output_free
    from cl_ray.device import keep_freed_memory
    from cl_ray.label_prediction import predict_labels, write_with_labels
    from cl_ray.model import load
    from cl_ray.storage import open_filesystem
    from cl_ray.training.preflight import check_label_draw, check_outlives_job

    keep_freed_memory()
    check_outlives_job(asked.out, "out")
    check_output_free(asked.out, asked.overwrite)
    console = PlainConsole()
    say = partial(print_line, console)
    model = load(asked.run, asked.checkpoint, asked.device)
    dataset = Dataset.open(asked.data or model.config.data)
    model.check_shape(dataset)
    if open_filesystem(asked.out) == open_dataset_location(dataset.location):
        raise UserError(f"out {asked.out} is the dataset itself: give another folder.")
    names = dataset.class_names()
    ids, true = dataset.read_labels(TRAIN_SPLIT)
    given = true
    if asked.count is not None:
        check_label_draw("count", asked.count, dataset)
        drawn = draw_labelled_ids(dataset, asked.count, asked.seed)
        given = np.where(np.isin(ids, drawn), true, UNLABELLED)
    used = int((given != UNLABELLED).sum())
    if used == len(given):
        raise UserError(
            f"All {used:,} training images of {dataset.location} have a label: give --count to try "
            "how well fewer predict the others."
        )
    with DatasetProgress(console) as progress:
        label, confidence = predict_labels(model.embed, dataset, given, progress.report)
        label = np.where(confidence >= asked.confidence, label, UNLABELLED)
        how = f"{pluralize(used, 'label')}, the others predicted over {asked.run}"
        if model.supervision:
            how += f" (trained with {model.supervision})"
        if dataset.info.predicted_labels:
            how += f"; of these, {dataset.info.predicted_labels}"
        write_with_labels(
            dataset, label, how, asked.out, overwrite=asked.overwrite, progress=progress.report
        )
    predicted = (given == UNLABELLED) & (label != UNLABELLED)
    shown = [
        f"{names[number]} {count:,}" for number, count in counts_by_label(label[predicted]).items()
    ]
    more = ", …" if len(shown) > LISTED_CLASSES else ""
    say(f"predicted: {', '.join(shown[:LISTED_CLASSES])}{more}")
    hidden = predicted & (true != UNLABELLED)
    if hidden.any():
        error = float((label != true)[hidden].mean())
        say(f"{error:.2%} of {hidden.sum():,} predicted labels differ from the hidden ones")
        if model.supervision:
            say(f"too few, for the run was trained with labels: {model.supervision}")
    if dataset.info.encoding == "jpeg":
        say("the JPEG images were encoded again, which changes pixels a little")
    print_dataset_summary(Dataset.open(asked.out).info, asked.out, console)
