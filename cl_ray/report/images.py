"""Grids of images for the page: of new images, and of those that the run saved."""

import base64
import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from cl_ray.data.decoding import ImageLimits, decode_image
from cl_ray.errors import UserError
from cl_ray.evaluation.classifier import Pixels
from cl_ray.storage import RunStorage

GAP = 2
"""Pixels between two images of a grid, also of those that a run saves, on grey."""
_SAVED_COLUMNS = 16
"""Images in a row of the samples that a run saves."""


@dataclass(frozen=True)
class ImageGrid:
    """One PNG that shows several images.

    Args:
        source: The PNG as a `data:` URI.
        alt: What it shows, for readers who do not see it.
        label: Text beside it.
    """

    source: str
    width: int
    height: int
    alt: str
    label: str = ""


def image_grid(images: Pixels, columns: int, alt: str, label: str = "") -> ImageGrid:
    """Lay out images [n, H, W, C] row by row, see `draw_grid`."""
    return png_grid(draw_grid(images, columns), alt, label)


def png_grid(sheet: Image.Image, alt: str, label: str = "") -> ImageGrid:
    """Return a sheet of images for the page."""
    return ImageGrid(png_uri(encode_png(sheet)), sheet.width, sheet.height, alt, label)


def draw_grid(images: Pixels, columns: int) -> Image.Image:
    """Lay out images [n, H, W, C] row by row; the gaps between them are transparent."""
    n, height, width, channels = images.shape
    rows = -(-n // columns)
    sheet = np.zeros(
        (rows * (height + GAP) - GAP, columns * (width + GAP) - GAP, channels + 1), np.uint8
    )
    for i, image in enumerate(images):
        top, left = i // columns * (height + GAP), i % columns * (width + GAP)
        sheet[top : top + height, left : left + width, :-1] = image
        sheet[top : top + height, left : left + width, -1] = 255
    return Image.fromarray(sheet)


def encode_png(image: Image.Image) -> bytes:
    """Return the content of a PNG file."""
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return file.getvalue()


def png_uri(png: bytes) -> str:
    """Return a PNG file as a `data:` URI."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def saved_epochs(folder: RunStorage, kind: str) -> list[int]:
    """Return the epochs for which `samples/{kind}-0001.png` and so on exist."""
    names = [n for n in folder.files("samples") if n.startswith(f"{kind}-")]
    numbers = [n.removeprefix(f"{kind}-").removesuffix(".png") for n in names]
    return sorted(int(n) for n in numbers if n.isdigit())


def read_saved_grid(folder: RunStorage, kind: str, epoch: int) -> Image.Image | None:
    """Read a grid that the run saved; None if it is damaged."""
    file = f"samples/{kind}-{epoch:04d}.png"
    try:
        return decode_image(folder.read(file) or b"", f"{folder}/{file}", ImageLimits())
    except UserError:
        return None


def epoch_strip(folder: RunStorage, max_epochs: int, columns: int) -> list[ImageGrid]:
    """Return a row of samples of the same noise for each epoch, or for some, evenly spread."""
    epochs = saved_epochs(folder, "samples")
    if len(epochs) > max_epochs:
        epochs = sorted({epochs[round(i)] for i in np.linspace(0, len(epochs) - 1, max_epochs)})
    rows = []
    for epoch in epochs:
        sheet = read_saved_grid(folder, "samples", epoch)
        pitch = (sheet.width - GAP) // _SAVED_COLUMNS if sheet else 0
        if sheet and pitch > GAP:
            row = sheet.crop((GAP, GAP, columns * pitch, pitch))
            alt = f"{columns} samples after epoch {epoch}, of the same noise in each row."
            rows.append(png_grid(row, alt, f"{epoch}"))
    return rows


def last_pairs(folder: RunStorage) -> ImageGrid | None:
    """Return the last epoch's pairs as the run saved them: x+, G(x+), x- and G(x-) of each."""
    epochs = saved_epochs(folder, "pairs")
    sheet = read_saved_grid(folder, "pairs", epochs[-1]) if epochs else None
    return png_grid(sheet, "Pairs of images, row by row: x+, G(x+), x-, G(x-).") if sheet else None
