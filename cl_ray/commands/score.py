"""`cl-ray score`: how novel a dataset's images are to a run, and a picture of the most novel."""

from collections.abc import Sequence

from pydantic import Field
from rich.table import Table

from cl_ray.cli import parse_flags
from cl_ray.commands.generate import InferenceCommand, run_command
from cl_ray.console import PlainConsole
from cl_ray.errors import UserError

PICTURE, PICTURED, COLUMNS = "_most_novel.png", 100, 10
"""The picture's name, and its images in all and in a row. Readers of Parquet skip the name."""


class ScoreCommand(InferenceCommand):
    """Write the novelty of images: columns id, label, origin (if any), novelty and distance."""

    out: str = Field(
        description="Folder or URI whose name ends in .parquet: a folder of Parquet files that "
        "reads as one table."
    )
    data: str = Field(
        min_length=1,
        description="Images to score: `mnist`, or a folder or URI that `cl-ray data` wrote.",
    )
    split: str = Field("test", description="Which of its splits.")
    known: str | None = Field(
        None,
        min_length=1,
        description="Dataset whose splits train and validation the images are compared with; None "
        "is what the run was trained on.",
    )
    top: int = Field(
        10,
        ge=0,
        description=f"Most novel images to list. {PICTURED} or as many are shown in "
        f"OUT/{PICTURE}, the most novel first; 0 leaves out list and picture.",
    )


def command(arguments: Sequence[str]) -> None:
    """Run `cl-ray score`."""
    options = parse_flags(ScoreCommand, arguments, prog="cl-ray score")
    from cl_ray.data.dataset import Dataset
    from cl_ray.inference.output import OutputFolder
    from cl_ray.inference.tasks import ScoreTask
    from cl_ray.model import load

    output = OutputFolder.resolve(options.out)
    if not output.parquet:
        raise UserError(f"out {options.out!r} must end in .parquet: scores are no images.")
    dataset = Dataset.open(options.data)
    groups = dataset.row_groups(options.split)
    model = load(options.run, options.checkpoint, "cpu")
    known = Dataset.open(options.known or model.config.data)
    run_command(options, ScoreTask(dataset, options.split, known), model)
    if not options.top:
        return
    from cl_ray.report.images import draw_grid, encode_png

    rows = output.largest("distance", max(options.top, PICTURED))
    places = [row.pop("row") for row in rows]
    ranges = [groups.rows(place, place + 1)[0] for place in places]
    images = dataset.read(options.split, ranges).image
    output.add_picture(PICTURE, encode_png(draw_grid(images, COLUMNS)))
    shown = rows[: options.top]
    table = Table(*shown[0], title=f"The {len(shown)} most novel images", title_justify="left")
    for row in shown:
        cells = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    console = PlainConsole(highlight=False, soft_wrap=True)
    console.print(table)
    console.print(f"{len(rows)} of them, the most novel first: {output}/{PICTURE}")
