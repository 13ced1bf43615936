"""`cl-ray evaluate`: what a run's networks are worth, as a table and as evaluation.json."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.console import Console
from rich.table import Table

from cl_ray.base_config import BaseConfig
from cl_ray.cli import RunPath, parse
from cl_ray.config import Device
from cl_ray.errors import UserError

if TYPE_CHECKING:
    from cl_ray.evaluation.evaluate import Evaluation

WORDS = {
    "frechet": "Fréchet distance",
    "kernel": "kernel distance",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "label_entropy": "entropy of the labels, nats",
    "label_balance": "rarest label : commonest",
    "class_accuracy": "of the class asked for",
    "classification_accuracy": "accuracy of a classifier trained on them",
    "modes": "modes with a sample",
    "mode_kl": "KL(samples || data) over modes, nats",
    "knn_1": "1-NN",
    "knn_20": "20-NN",
    "linear_probe": "linear probe",
}
"""What metrics are called in the table; those of few labels carry the number in their name."""


LISTED = 40
"""Labels whose samples are listed one by one, at most."""


class EvaluateCommand(BaseConfig):
    """Measure a run's samples and features, beside what real images reach; needs no Ray."""

    run: RunPath = Field(min_length=1, description="Run folder or its URI.")
    checkpoint: str = Field("last", description="`last`, `best` or a checkpoint's name.")
    data: str | None = Field(
        None,
        min_length=1,
        description="Data set to measure on; None is what the run was trained on.",
    )
    reference: str | None = Field(
        None, description="As --evaluation.reference of `cl-ray train`; None is the run's own."
    )
    samples: int = Field(
        10_000,
        gt=5,
        description="Generated images, compared with as many real test images. Modes of stacked "
        "digits are always counted in 26,000, as papers do.",
    )
    images: int | None = Field(
        None, gt=5, description="Training images that are learnt from; None is all of them."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Of what is drawn.")
    device: Device = Field("auto", description="Where the networks compute.")


def command(arguments: Sequence[str]) -> None:
    """Run it."""
    asked = parse(EvaluateCommand, arguments, prog="cl-ray evaluate")
    import torch

    from cl_ray.data.dataset import Dataset
    from cl_ray.device import keep_freed_memory
    from cl_ray.evaluation.config import EvaluationConfig
    from cl_ray.evaluation.evaluate import Evaluator
    from cl_ray.model import load
    from cl_ray.storage import RunStorage

    keep_freed_memory()
    console = Console()
    run = load(asked.run, asked.checkpoint, asked.device)
    dataset = Dataset.open(asked.data or run.config.data)
    if dataset.info.shape != run.shape:
        raise UserError(
            f"data {dataset.info.name} has images of {list(dataset.info.shape)}; the run "
            f"{asked.run} makes {list(run.shape)}: give --data with images of that shape."
        )
    config = EvaluationConfig(
        reference=asked.reference or run.config.evaluation.reference,
        samples=asked.samples,
        images=asked.images or max(6, dataset.info.splits["train"].rows),
    )
    evaluator = Evaluator(dataset, config, asked.seed)
    chosen = f"{run.device.type}, {torch.get_num_threads()} threads"
    console.print(f"{asked.run}, {run.checkpoint}, on {chosen}", highlight=False, soft_wrap=True)
    with console.status("") as status:

        def tell(what: str) -> None:
            if console.is_terminal:
                status.update(what)
            else:
                console.print(f"measuring: {what}", highlight=False)

        found = evaluator.evaluate(run, thorough=True, tell=tell)
    folder = RunStorage.of(asked.run)
    show(found, console)
    folder.write("evaluation.json", json.dumps(found.to_dict(), indent=1).encode())
    console.print(f"written to {folder}/evaluation.json", highlight=False, soft_wrap=True)


def show(evaluation: "Evaluation", console: Console) -> None:
    """Every figure beside its floor, then the notes."""
    fidelity = evaluation.fidelity
    if fidelity:
        table = Table(
            f"{fidelity.count:,} samples, over {fidelity.features}",
            "samples",
            "real images",
            title="Generation",
            title_justify="left",
        )
        for name, figure in fidelity.metrics.items():
            shown = f"{figure.value:.4f}"
            if name == "frechet" and figure.floor:
                shown += f"  ({figure.value / figure.floor:.1f} x)"
            table.add_row(WORDS[name], shown, f"{figure.floor:.4f}")
        if fidelity.histogram and len(fidelity.histogram) <= LISTED:
            table.add_row("samples of each label", " ".join(map(str, fidelity.histogram)), "")
        console.print(table)
    modes = evaluation.modes
    if modes:
        title = f"Mode collapse: {modes.of:,} modes of stacked digits"
        head = f"{modes.count:,} samples, by {modes.features}"
        table = Table(head, "samples", "real triples", title=title, title_justify="left")
        found, divergence = modes.metrics["modes"], modes.metrics["mode_kl"]
        table.add_row(WORDS["modes"], f"{found.value:.0f}", f"{found.floor:.0f}")
        table.add_row(WORDS["mode_kl"], f"{divergence.value:.4f}", f"{divergence.floor:.4f}")
        console.print(table)
    if evaluation.representation:
        labels = f" with labels ({evaluation.supervision})" if evaluation.supervision else ""
        title = (
            f"Representation, learnt from pairs by {evaluation.pairs}{labels}; read by "
            f"{evaluation.learnt_from:,} training images"
        )
        table = Table("accuracy", "D", "G's encoder", "pixels", title=title, title_justify="left")
        scores = {who: found.scores for who, found in evaluation.representation.items()}
        for name in scores["discriminator"]:
            table.add_row(words(name), *(accuracy(of.get(name)) for of in scores.values()))
        console.print(table)
    error = evaluation.reconstruction
    console.print(
        f"Reconstruction: mean squared error {error.error:.4f} of pixels in 0 to 1; the mean "
        f"image's is {error.mean_image:.4f}.",
        highlight=False,
    )
    for note in evaluation.notes:
        console.print(note, highlight=False, soft_wrap=True)


def words(name: str) -> str:
    """A score's name in the table."""
    if name in WORDS:
        return WORDS[name]
    count = name.split("_")[1]
    return f"{count} labels, spread over all images" if "spread" in name else f"{count} labels"


def accuracy(score: Any) -> str:
    """A score as a percentage, with its spread over draws of labels."""
    if score is None:
        return "–"
    spread = f" ± {score.spread:.2%}" if score.spread is not None else ""
    return f"{score.accuracy:.2%}{spread}"
