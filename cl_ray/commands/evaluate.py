"""`cl-ray evaluate`: measure a run's networks; print a table and write evaluation.json."""

import json
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING

from pydantic import Field
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cl_ray.base_config import BaseConfig
from cl_ray.cli import RunPath, parse_flags
from cl_ray.config import Device
from cl_ray.console import PlainConsole, print_line
from cl_ray.errors import UserError

if TYPE_CHECKING:
    from cl_ray.evaluation.evaluate import Evaluation

_MAX_LISTED = 40
"""Classes whose samples are counted one by one, at most."""


class EvaluateCommand(BaseConfig):
    """Measure a run's samples and features on the test split, with real-data baselines."""

    run: RunPath = Field(min_length=1, description="Run folder or its URI.")
    checkpoint: str = Field("last", description="`last`, `best` or a checkpoint's name.")
    data: str | None = Field(
        None,
        min_length=1,
        description="Dataset to measure on; None is what the run was trained on.",
    )
    reference: str | None = Field(
        None,
        description="As --evaluation.reference of `cl-ray train`; None is the run's own. auto "
        "trains one, once, where the data has labels and none is packaged.",
    )
    samples: int = Field(
        10_000,
        gt=5,
        description="Generated images, compared with as many real ones of the split test. Modes "
        "of stacked digits are always counted in 26,000, as in papers.",
    )
    images: int | None = Field(
        None,
        gt=5,
        description="Training images that probes are fitted to; None is all, up to 60,000 images "
        "and 2 GB of pixels.",
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of all random draws.")
    device: Device = Field("auto", description="Where the networks compute.")


def command(arguments: Sequence[str]) -> None:
    """Run the command."""
    asked = parse_flags(EvaluateCommand, arguments, prog="cl-ray evaluate")
    import torch

    from cl_ray.data.dataset import Dataset
    from cl_ray.device import keep_freed_memory
    from cl_ray.evaluation.config import EvaluationConfig
    from cl_ray.evaluation.evaluate import Evaluator, default_images
    from cl_ray.evaluation.reference_cache import optional_reference
    from cl_ray.evaluation.reference_name import needs_training
    from cl_ray.model import load
    from cl_ray.storage import RunStorage

    keep_freed_memory()
    console = PlainConsole()
    model = load(asked.run, asked.checkpoint, asked.device)
    dataset = Dataset.open(asked.data or model.config.data)
    if dataset.info.shape != model.shape:
        raise UserError(
            f"data {dataset.info.name} has images of {list(dataset.info.shape)}; the run "
            f"{asked.run} makes {list(model.shape)}: give --data with images of that shape."
        )
    device = f"{model.device.type}, {torch.get_num_threads()} threads"
    chosen = "last"
    if asked.checkpoint == "best":
        where = "the split validation" if "validation" in dataset.info.splits else "training images"
        chosen = f"chosen on {'the data of the run' if asked.data else where}"
    print_line(console, f"{asked.run}, {model.checkpoint} ({chosen}), on {device}")
    folder = RunStorage.from_uri(asked.run)
    with console.status("") as status, tempfile.TemporaryDirectory() as spare:

        def tell(step: str) -> None:
            if console.is_terminal:
                status.update(Text(step))
            else:
                print_line(console, f"measuring: {step}")

        say = partial(print_line, console)
        reference = asked.reference or model.config.evaluation.reference
        if reference == "auto" and needs_training(dataset):
            beside = [f"{dataset.location}.reference", f"{folder.uri}/reference"]
            folders = [place for place in beside if "://" not in place]
            reference = optional_reference(dataset, [*folders, spare], tell, say) or reference
        config = EvaluationConfig(
            reference=reference,
            samples=asked.samples,
            images=asked.images or max(6, default_images(dataset)),
        )
        evaluator = Evaluator(dataset, config, "test", asked.seed, model.device)
        evaluation = evaluator.evaluate(model, thorough=True, tell=tell)
    print_evaluation(evaluation, console)
    folder.write("evaluation.json", json.dumps(asdict(evaluation), indent=1).encode())
    print_line(console, f"written to {folder}/evaluation.json")


def print_evaluation(evaluation: "Evaluation", console: Console) -> None:
    """Print every metric beside its real-data baseline, then the notes."""
    from cl_ray.evaluation.metrics import is_fraction, metric_title

    def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
        table = Table(*columns, title=title, title_justify="left")
        for row in rows:
            table.add_row(*row)
        console.print(table)

    def side_by_side(tables: Sequence[dict[str, str]]) -> list[list[str]]:
        return [[metric_title(n), *(of.get(n, "–") for of in tables)] for n in tables[0]]

    split, fidelity, modes = evaluation.split, evaluation.fidelity, evaluation.modes
    if fidelity:
        rows = []
        for name, metric in fidelity.metrics.items():
            value = f"{metric.value:.4f}"
            if name == "frechet" and metric.real_baseline:
                value += f"  ({metric.value / metric.real_baseline:.1f} x)"
            rows.append((metric_title(name), value, f"{metric.real_baseline:.4f}"))
        if fidelity.histogram and len(fidelity.histogram) <= _MAX_LISTED:
            rows.append(("samples of each label", " ".join(map(str, fidelity.histogram)), ""))
        columns = f"{fidelity.count:,} samples, over {fidelity.features}", "samples", "real images"
        print_table(f"Generation, against the split {split}", columns, rows)
    if modes:
        rows = []
        for name, metric in modes.metrics.items():
            form = ".0f" if name == "modes" else ".4f"
            values = format(metric.value, form), format(metric.real_baseline, form)
            rows.append((metric_title(name), *values))
        columns = f"{modes.count:,} samples, by {modes.features}", "samples", "real triples"
        print_table(f"Mode collapse: {modes.of:,} modes of stacked digits", columns, rows)
    if fidelity or modes:
        baseline = "the same metric of as many real images in the place of the samples"
        print_line(console, f"real images: the real-data baseline, {baseline}.")
    owners = "D", "G's encoder", "pixels"
    if any(evaluation.representation.values()):
        labels = f" with labels ({evaluation.supervision})" if evaluation.supervision else ""
        title = (
            f"Representation, trained on pairs by {evaluation.pairs}{labels}; measured "
            f"with {evaluation.probe_images:,} training images on the split {split}"
        )
        tables = [
            {n: _with_spread(s.value, s.spread, ".2%" if is_fraction(n) else ".4f") for n, s in of}
            for of in map(dict.items, evaluation.representation.values())
        ]
        print_table(title, ("", *owners), side_by_side(tables))
    if classified := evaluation.classification:
        error = f"error {classified.error:.2%} of {classified.count:,} images of the split {split}"
        print_line(console, f"D's classifier ({evaluation.supervision}): {error}.")
    found = evaluation.reconstruction
    error = f"mean squared error {found.error:.4f} of pixels in [0, 1]"
    print_line(console, f"Reconstruction: {error}; the mean image's is {found.mean_image:.4f}.")
    for note in evaluation.notes:
        print_line(console, note)


def _with_spread(value: float, spread: float | None, form: str) -> str:
    """Format a score, with its spread over draws or seeds."""
    return format(value, form) + (f" ± {spread:{form}}" if spread is not None else "")
