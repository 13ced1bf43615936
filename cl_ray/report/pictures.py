"""Pictures for the page: images laid out, and those that the run saved, laid out anew."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cl_ray.report.records import listing
from cl_ray.storage import RunStorage

Pixels = NDArray[np.uint8]
SAVED_COLUMNS, SAVED_GAP = 16, 2
"""How journal.py lays out the pictures that it saves."""
GAP = 2


@dataclass(frozen=True)
class ImageGrid:
    """An image as the page holds it.

    Args:
        source: A `data:` URI of a PNG.
        width: Pixels.
        height: Pixels.
        alt: What it shows.
        label: What stands beside it.
    """

    source: str
    width: int
    height: int
    alt: str
    label: str = ""


def image_grid(images: Pixels, columns: int, alt: str, label: str = "") -> ImageGrid:
    """Images [n, H, W, C], row by row, with nothing between them: the page shows through."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.zeros(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels + 1), np.uint8
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width, :-1] = image
        sheet[top : top + height, left : left + width, -1] = 255
    file = io.BytesIO()
    Image.fromarray(sheet).save(file, "png", optimize=True)
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    return ImageGrid(source, sheet.shape[1], sheet.shape[0], alt, label)


def saved_epochs(folder: RunStorage, kind: str) -> list[int]:
    """The epochs of which `samples/{kind}-0001.png` and so on are there."""
    names = [n for n in listing(folder, "samples") if n.startswith(f"{kind}-")]
    numbers = [n.removeprefix(f"{kind}-").removesuffix(".png") for n in names]
    return sorted(int(n) for n in numbers if n.isdigit())


def saved(folder: RunStorage, kind: str, epoch: int) -> Pixels:
    """The images of a picture that the run saved, [n, side, side, 3]; none if it is damaged."""
    blob = folder.read(f"samples/{kind}-{epoch:04d}.png") or b""
    try:
        sheet = np.asarray(Image.open(io.BytesIO(blob)).convert("RGB"))
    except (OSError, SyntaxError):
        return np.empty((0, 1, 1, 3), np.uint8)
    pitch = (sheet.shape[1] - SAVED_GAP) // SAVED_COLUMNS
    side = pitch - SAVED_GAP
    tiles = [
        sheet[top : top + side, left : left + side]
        for top in range(SAVED_GAP, sheet.shape[0] - side, pitch)
        for left in range(SAVED_GAP, sheet.shape[1] - side, pitch)
    ]
    # Where the last row is short, the rest is the grey between the images.
    return np.array([t for t in tiles if t.min() != t.max() or t[0, 0, 0] not in (127, 128)])


def grey_if_grey(images: Pixels) -> Pixels:
    """One channel where the three are alike: a third of the bytes."""
    alike = (images == images[..., :1]).all()
    return images[..., :1] if alike else images


def strip(folder: RunStorage, most: int, columns: int) -> list[ImageGrid]:
    """A row of the same noise's samples for each epoch, or for some, evenly spread."""
    there = saved_epochs(folder, "samples")
    chosen = (
        sorted({there[round(i)] for i in np.linspace(0, len(there) - 1, most)}) if there else []
    )
    rows = []
    for epoch in chosen:
        images = saved(folder, "samples", epoch)[:columns]
        if len(images):
            alt = f"{len(images)} samples after epoch {epoch}, of the same noise in each row."
            rows.append(image_grid(grey_if_grey(images), columns, alt, f"{epoch}"))
    return rows


def pairs(folder: RunStorage, columns: int) -> list[ImageGrid]:
    """The last epoch's pairs: blocks of four rows x+, G(x+), x-, G(x-), a pair a column."""
    there = saved_epochs(folder, "pairs")
    images = saved(folder, "pairs", there[-1]) if there else np.empty((0, 1, 1, 3), np.uint8)
    images = grey_if_grey(images[: len(images) // 4 * 4])
    whole = images.reshape(-1, 4, *images.shape[1:])
    blocks = []
    for start in range(0, len(whole), columns):
        part = whole[start : start + columns]
        by_row = part.swapaxes(0, 1).reshape(-1, *images.shape[1:])
        alt = f"{len(part)} pairs: in a column x+, G(x+), x- and G(x-)."
        blocks.append(image_grid(by_row, len(part), alt))
    return blocks


def blocks(images: Pixels, columns: int, rows: int, what: str) -> list[ImageGrid]:
    """Images in pictures of so many columns and rows, which a wide page sets side by side."""
    size = columns * rows
    parts: Sequence[Pixels] = [images[i : i + size] for i in range(0, len(images), size)]
    return [image_grid(part, columns, f"{len(part)} {what}.") for part in parts]
