"""Convert images to the pixels of a dataset: size, colour, transparency and depth."""

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageOps

from cl_ray.data.decoding import decoder_errors
from cl_ray.data.source_config import SourceConfig
from cl_ray.errors import UserError

Convert = Callable[[Image.Image, str], NDArray[np.uint8]]
"""An image and what error messages call it → [H, W, C]; `to_pixels` with its options bound."""


class DepthRange:
    """The smallest and the largest value of a source's pixels, if these have more than 8 bits."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self._deep = self._shallow = ""
        self._lock = threading.Lock()

    def add(self, image: Image.Image, name: str) -> NDArray[np.uint8]:
        """Take an image into account, in any thread; the pixels that are returned mean nothing.

        Raises:
            UserError: A pixel is NaN or Inf.
        """
        deep = _is_deep(image)
        values = np.asarray(image) if deep else np.empty(0)
        if not np.isfinite(values).all():
            raise UserError(f"{name} has pixels that are NaN or Inf: repair or remove it.")
        with self._lock:
            if deep:
                self._deep = self._deep or name
                self.low = min(self.low, float(values.min()))
                self.high = max(self.high, float(values.max()))
            else:
                self._shallow = self._shallow or name
        return np.empty((1, 1, 1), np.uint8)

    def check(self) -> None:
        """Check the range of all images.

        Raises:
            UserError: Not all images have more than 8 bits, or all pixels are the same.
        """
        if not self._deep:
            raise UserError("No image has more than 8 bits a channel: leave --scale-depth out.")
        if self._shallow:
            raise UserError(
                f"{self._deep} has more than 8 bits a channel and {self._shallow} has not, so "
                "--scale-depth cannot map them alike: give images of one kind."
            )
        if self.low == self.high:
            raise UserError(f"All pixels are {self.low:g}: --scale-depth has no range to map.")

    def scale(self, image: Image.Image) -> Image.Image:
        """Map the range to 0 to 255, linearly and rounded."""
        values = (np.asarray(image, np.float64) - self.low) * (255 / (self.high - self.low))
        return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))


def to_pixels(
    image: Image.Image, name: str, config: SourceConfig, depth: DepthRange | None
) -> NDArray[np.uint8]:
    """Convert an image to pixels.

    Args:
        image: Of any of Pillow's modes.
        name: What error messages call it.
        config: Its `size`, `color` and `background`.
        depth: The range that is mapped to 8 bits, for images of more.

    Returns:
        [H, W, C] uint8, C 1 (grey) or 3 (RGB).

    Raises:
        UserError: A pixel is transparent and there is no background, the image has more than 8
            bits a channel and there is no range, or `keep` meets neither grey nor RGB.
    """
    with decoder_errors(name):
        if _is_deep(image):
            if depth is None:
                raise UserError(
                    f"{name} has more than 8 bits a channel: convert it to 8 bits, or add "
                    "`--scale-depth` to map the smallest to the largest value of all images to 0 "
                    "to 255."
                )
            image = depth.scale(image)
        if image.has_transparency_data:
            image = _lay_on(config.background, image, name)
        elif image.mode in ("1", "P"):
            image = image.convert("L" if image.mode == "1" else "RGB")
        if image.mode not in ("L", "RGB"):
            if config.color == "keep":
                raise UserError(
                    f"{name} is stored as {image.mode}: add `--color rgb` to convert it."
                )
            image = image.convert("RGB")
        if config.color != "keep":
            image = image.convert("L" if config.color == "grey" else "RGB")
        if config.size is not None:
            image = ImageOps.fit(image, (config.size, config.size), Image.Resampling.LANCZOS)
        return np.asarray(image).reshape(image.height, image.width, -1)


def _lay_on(background: str | None, image: Image.Image, name: str) -> Image.Image:
    """Return a transparent image on a colour, which it needs only if a pixel is not opaque."""
    opaque = image if image.mode == "RGBA" else image.convert("RGBA")
    grey = image.mode in ("1", "L", "LA", "La")
    if opaque.getchannel("A").getextrema()[0] != 255:
        if background is None:
            raise UserError(
                f"{name} is partly transparent: add `--background white`, or another color, to "
                "lay it on."
            )
        red, green, blue = ImageColor.getrgb(background)[:3]
        below = Image.new("RGBA", opaque.size, (red, green, blue))
        opaque = Image.alpha_composite(below, opaque)
        grey = grey and red == green == blue
    return opaque.convert("L" if grey else "RGB")


def _is_deep(image: Image.Image) -> bool:
    """Return whether an image is grey with integers of more than 8 bits, or with floats."""
    return image.mode[0] in "IF"
