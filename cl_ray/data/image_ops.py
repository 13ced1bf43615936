"""Any stored image → uint8 pixels of the wanted size and colour, or a refusal by name."""

from collections.abc import Callable
from io import BytesIO
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from cl_ray.data.dataset import first_error_line
from cl_ray.errors import UserError

Color = Literal["keep", "grey", "rgb"]
Convert = Callable[[Image.Image, str], NDArray[np.uint8]]
"""`to_pixels` with its choices made: an image and what to call it → [H, W, C]."""


def decode(data: bytes, where: str) -> Image.Image:
    """Decodes an image file of any format that Pillow reads, turned the way its EXIF says.

    Args:
        data: the file's content.
        where: what to call it in a message.

    Raises:
        UserError: if it cannot be decoded, holds several frames, or has more than 8 bits a channel.
    """
    try:
        with Image.open(BytesIO(data)) as image:
            # A phone's MPO is one photograph with a preview behind it.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise UserError(f"{where} holds {frames} frames: save each as an image of its own.")
            # Pillow keeps the high byte of 16-bit RGB without a word; only the tile tells.
            # (BGR;16 is the other way round: 5 or 6 bits a channel, all of which are kept.)
            deep = any(
                ";16" in str(tile[3]) and "BGR;16" not in str(tile[3]) for tile in image.tile
            )
            if deep or image.mode[0] in "IF":
                raise UserError(f"{where} has more than 8 bits a channel: convert it to 8 bits.")
            return ImageOps.exif_transpose(image)
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{where} cannot be read as an image ({first_error_line(error)}): mend or remove it."
        ) from error


def to_pixels(image: Image.Image, where: str, size: int | None, color: Color) -> NDArray[np.uint8]:
    """Returns an image's pixels.

    Args:
        image: 8 bits a channel.
        where: what to call it in a message.
        size: scale the shorter side to this many pixels, antialiased, and cut out the middle
            square; None leaves the size alone.
        color: `grey` and `rgb` convert, `keep` keeps which of the two it is.

    Returns:
        [H, W, C] uint8, C 1 (grey) or 3 (RGB).

    Raises:
        UserError: if a pixel is transparent, or `keep` meets neither grey nor RGB.
    """
    if image.has_transparency_data:
        opaque = image.convert("RGBA")
        if opaque.getchannel("A").getextrema()[0] != 255:
            raise UserError(
                f"{where} is partly transparent: lay it on a background of your choice first."
            )
        image = opaque.convert("L" if image.mode in ("1", "L", "LA", "La") else "RGB")
    elif image.mode in ("1", "P"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if image.mode not in ("L", "RGB"):
        if color == "keep":
            raise UserError(f"{where} is stored as {image.mode}: add `--color rgb` to convert it.")
        image = image.convert("RGB")
    if color != "keep":
        image = image.convert("L" if color == "grey" else "RGB")
    if size is not None:
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return np.asarray(image).reshape(image.height, image.width, -1)
