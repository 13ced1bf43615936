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

_SAVED_COLUMNS, _SAVED_GAP = 16, 2
"""The layout of the grids that a run saves; their padding is grey."""
GAP = 2
"""Pixels between two images of a grid."""


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
    sheet = draw_grid(images, columns)
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


def read_saved_images(folder: RunStorage, kind: str, epoch: int, side: int | None = None) -> Pixels:
    """Cut a saved grid into its images [n, side, side, C]; n is 0 if the file is damaged.

    C is 1 where the images are grey, else 3. Without `side` the grid has 16 columns, as one of
    16 images or more has.
    """
    file = f"samples/{kind}-{epoch:04d}.png"
    try:
        image = decode_image(folder.read(file) or b"", f"{folder}/{file}", ImageLimits())
    except UserError:
        return np.empty((0, 1, 1, 1), np.uint8)
    sheet = np.asarray(image.convert("RGB"))
    side = side or (sheet.shape[1] - _SAVED_GAP) // _SAVED_COLUMNS - _SAVED_GAP
    pitch = side + _SAVED_GAP
    if side < 1:
        return np.empty((0, 1, 1, 1), np.uint8)
    tiles = [
        sheet[top : top + side, left : left + side]
        for top in range(_SAVED_GAP, sheet.shape[0] - side, pitch)
        for left in range(_SAVED_GAP, sheet.shape[1] - side, pitch)
    ]
    # A short last row is filled up with the grey of the padding.
    images = np.array([t for t in tiles if t.min() != t.max() or t[0, 0, 0] not in (127, 128)])
    is_grey = bool((images == images[..., :1]).all())
    return images[..., :1] if is_grey else images


def epoch_strip(folder: RunStorage, max_epochs: int, columns: int) -> list[ImageGrid]:
    """Return a row of samples of the same noise for each epoch, or for some, evenly spread."""
    epochs = saved_epochs(folder, "samples")
    if len(epochs) > max_epochs:
        epochs = sorted({epochs[round(i)] for i in np.linspace(0, len(epochs) - 1, max_epochs)})
    rows = []
    for epoch in epochs:
        images = read_saved_images(folder, "samples", epoch)[:columns]
        if len(images):
            alt = f"{len(images)} samples after epoch {epoch}, of the same noise in each row."
            rows.append(image_grid(images, columns, alt, f"{epoch}"))
    return rows


def pair_grids(folder: RunStorage, columns: int, side: int | None) -> list[ImageGrid]:
    """Return the last epoch's pairs: grids of four rows x+, G(x+), x-, G(x-), a pair a column.

    Fewer than four pairs are only read with the `side` of an image, in pixels.
    """
    epochs = saved_epochs(folder, "pairs")
    if not epochs:
        return []
    images = read_saved_images(folder, "pairs", epochs[-1], side)
    pairs = images[: len(images) // 4 * 4].reshape(-1, 4, *images.shape[1:])
    grids = []
    for start in range(0, len(pairs), columns):
        part = pairs[start : start + columns]
        rows = part.swapaxes(0, 1).reshape(-1, *images.shape[1:])
        alt = f"{len(part)} pairs: in a column x+, G(x+), x- and G(x-)."
        grids.append(image_grid(rows, len(part), alt))
    return grids
