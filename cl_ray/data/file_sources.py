"""What sources of files have in common: images become pixels, and names of files splits."""

import re
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from cl_ray.data.decoding import decoder_errors
from cl_ray.data.depth import DepthRange, is_deep
from cl_ray.data.writer import SPLIT_NAMES
from cl_ray.errors import UserError

Color = Literal["keep", "grey", "rgb"]
Convert = Callable[[Image.Image, str], NDArray[np.uint8]]
"""`to_pixels` with its options bound: an image and its name → [H, W, C]."""
SplitChoice = Literal["auto", "none"]
"""Whether names of files and folders can be splits."""
NO_LABELS = "none"
"""The value of `--label-column` that leaves the labels out."""

_SPLIT_NAME = re.compile(
    rf"(?:split=)?({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)


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


def find_file_splits(
    location: str, files: list[str], split_choice: SplitChoice
) -> dict[str, list[str]]:
    """Group files by the first of their folders, or their own name, that begins with a split's.

    Raises:
        UserError: Only some files name a split, or none names the training split.
    """
    splits: dict[str, list[str]] = {}
    for file in files if split_choice == "auto" else ():
        matches = (_SPLIT_NAME.match(part) for part in file.split("/"))
        split = next((SPLIT_NAMES[match[1].lower()] for match in matches if match), "")
        splits.setdefault(split, []).append(file)
    if set(splits) <= {""}:
        return {"train": files}
    check_file_splits(location, splits)
    return splits


def check_file_splits(location: str, splits: dict[str, list[str]]) -> None:
    """Check that there is a training split, and that all files are in a split.

    Args:
        location: What error messages call the source.
        splits: The files of each split; "" holds those of none.

    Raises:
        UserError: There is none, or a file is in none.
    """
    way_out = "add `--splits none` if all are training images"
    if "" in splits:
        raise UserError(
            f"{location} has files of named splits ({', '.join(s for s in splits if s)}), but "
            f"{splits[''][0]} names none: rename it to train-*, move it away, or {way_out}."
        )
    if "train" not in splits:
        raise UserError(
            f"{location} has no training split but only {', '.join(splits)}: rename its files to "
            f"train-*, or {way_out}."
        )
