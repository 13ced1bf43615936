"""What sources of files have in common: how pixels, splits and classes are found."""

from collections.abc import Callable, Set
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from cl_ray.data.conversion import DepthRange, is_deep
from cl_ray.data.dataset import MAX_CLASSES
from cl_ray.data.decoding import decoder_errors
from cl_ray.data.file_tree import Note
from cl_ray.errors import UserError

Color = Literal["keep", "grey", "rgb"]
Convert = Callable[[Image.Image, str], NDArray[np.uint8]]
"""`to_pixels` with its options bound: an image and its name → [H, W, C]."""
LabelValue = int | str | None
"""What a source has as a label; None is no label."""
NO_LABELS = "none"
"""The value of `--label-column` that leaves the labels out."""

_NO_LABEL = -1
"""Means no label among whole numbers, as in torchvision and scikit-learn."""


def to_pixels(
    image: Image.Image,
    name: str,
    size: int | None,
    color: Color,
    background: str | None = None,
    depth: DepthRange | None = None,
) -> NDArray[np.uint8]:
    """Convert an image to pixels.

    Args:
        image: Of any of Pillow's modes.
        name: What error messages call it.
        size: Scale the shorter side to this many pixels, antialiased, and crop the center square;
            None keeps the size.
        color: `grey` and `rgb` convert, `keep` keeps which of the two it is.
        background: Color that transparent pixels are laid on, a name or `#rrggbb`.
        depth: The range that is mapped to 8 bits, for images of more.

    Returns:
        [H, W, C] uint8, C 1 (grey) or 3 (RGB).

    Raises:
        UserError: A pixel is transparent and there is no background, the image has more than 8
            bits a channel and there is no range, or `keep` meets neither grey nor RGB.
    """
    with decoder_errors(name):
        return _to_pixels(image, name, size, color, background, depth)


def _to_pixels(
    image: Image.Image,
    name: str,
    size: int | None,
    color: Color,
    background: str | None,
    depth: DepthRange | None,
) -> NDArray[np.uint8]:
    if is_deep(image):
        if depth is None:
            raise UserError(
                f"{name} has more than 8 bits a channel: convert it to 8 bits, or add "
                "`--scale-depth` to map the smallest to the largest value of all images to 0 to "
                "255."
            )
        image = depth.scale(image)
    if image.has_transparency_data:
        opaque = image if image.mode == "RGBA" else image.convert("RGBA")
        grey = image.mode in ("1", "L", "LA", "La")
        if opaque.getchannel("A").getextrema()[0] != 255:
            if background is None:
                raise UserError(
                    f"{name} is partly transparent: add `--background white`, or another color, "
                    "to lay it on."
                )
            red, green, blue = ImageColor.getrgb(background)[:3]
            below = Image.new("RGBA", opaque.size, (red, green, blue))
            opaque = Image.alpha_composite(below, opaque)
            grey = grey and red == green == blue
        image = opaque.convert("L" if grey else "RGB")
    elif image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if image.mode not in ("L", "RGB"):
        if color == "keep":
            raise UserError(f"{name} is stored as {image.mode}: add `--color rgb` to convert it.")
        image = image.convert("RGB")
    if color != "keep":
        image = image.convert("L" if color == "grey" else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, -1)


def check_class_count(count: int, location: str, column: str) -> None:
    """Check the number of different labels.

    Raises:
        UserError: There are too many.
    """
    if count > MAX_CLASSES:
        raise UserError(
            f"{location} holds more than {MAX_CLASSES:,} different values in {column}, which are "
            "no classes: name another with `--label-column`, or `none`."
        )


def find_classes(
    values: Set[LabelValue],
    column: str,
    note: Note,
    known: list[str] | None = None,
    is_numbered: bool = False,
) -> tuple[list[str] | None, dict[LabelValue, int]]:
    """Return the names of the classes, None if they are numbers, and the class of each value.

    Values without a class have no label.

    Args:
        values: All different labels.
        column: What `note` calls their place.
        note: Called with a sentence if a number means no label.
        known: The names of the classes 0, 1, ..., if the source says them.
        is_numbered: Whether whole numbers are classes, whatever they are.
    """
    labels = set(values) - {None}
    if _NO_LABEL in labels and (known or labels != {_NO_LABEL, 1}):
        labels.remove(_NO_LABEL)
        note(f"The number {_NO_LABEL} in {column} means an image without a label.")
    numbers: dict[LabelValue, int] = {label: label for label in labels if isinstance(label, int)}
    is_numbered = is_numbered or known is not None or labels == set(range(len(labels)))
    if is_numbered and len(numbers) == len(labels):
        return known, numbers
    ordered = sorted(labels, key=lambda value: (isinstance(value, str), value))
    return [str(value) for value in ordered], {value: k for k, value in enumerate(ordered)}
