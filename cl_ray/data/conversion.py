"""Map grey images of more than 8 bits a channel to 8 bits, all images of a source alike."""

import threading
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cl_ray.errors import UserError


@dataclass(frozen=True)
class DepthRange:
    """The smallest and the largest value of a source's pixels."""

    low: float
    high: float

    def scale(self, image: Image.Image) -> Image.Image:
        """Map the range to 0 to 255, linearly and rounded."""
        values = (np.asarray(image, np.float64) - self.low) * (255 / (self.high - self.low))
        return Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))


def is_deep(image: Image.Image) -> bool:
    """Return whether an image is grey with integers of more than 8 bits, or with floats."""
    return image.mode[0] in "IF"


class DepthMeter:
    """Collects the range of images; `measure` may be called by several threads."""

    def __init__(self) -> None:
        self._low, self._high = np.inf, -np.inf
        self._deep = self._shallow = ""
        self._lock = threading.Lock()

    def measure(self, image: Image.Image, name: str) -> NDArray[np.uint8]:
        """Take an image into account; the pixels that are returned mean nothing.

        Raises:
            UserError: A pixel is NaN or Inf.
        """
        deep = is_deep(image)
        values = np.asarray(image) if deep else np.empty(0)
        if not np.isfinite(values).all():
            raise UserError(f"{name} has pixels that are NaN or Inf: repair or remove it.")
        with self._lock:
            if deep:
                self._deep = self._deep or name
                self._low = min(self._low, float(values.min()))
                self._high = max(self._high, float(values.max()))
            else:
                self._shallow = self._shallow or name
        return np.empty((1, 1, 1), np.uint8)

    def compute_range(self) -> DepthRange:
        """Return the range of all images that were measured.

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
        if self._low == self._high:
            raise UserError(f"All pixels are {self._low:g}: --scale-depth has no range to map.")
        return DepthRange(self._low, self._high)
