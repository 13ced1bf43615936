"""Decode image files of any origin: listed formats only, with bounded memory.

A file that is too large is refused by its header, before its pixels are decoded. Whatever a
decoder raises becomes one sentence with the file's name. `encode_pixels` and `decode_pixels` are
for images at rest, whose format and shape are known.
"""

import contextlib
import os
import re
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from cl_ray.errors import UserError, first_error_line

Encoding = Literal["raw", "png", "webp", "jpeg"]
"""How images are stored in a dataset: as pixels, or as files of a format. JPEG alone is lossy."""
MIN_SIDE, MAX_SIDE = 16, 256
"""Sides of a dataset's images in pixels."""
JPEG_QUALITY = 95
"""Default quality of JPEG at rest."""

Image.init()
FORMATS = tuple(
    name
    for name in ("AVIF", "BMP", "DIB", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
    if name in Image.OPEN  # AVIF is not in Pillow before 11.3
)
"""Pillow's formats that are opened. Others start programs, as PostScript does Ghostscript."""
ENDINGS = frozenset(ending for ending, name in Image.EXTENSION.items() if name in (*FORMATS, "MPO"))
"""Endings of the names of such files, in lower case."""
MAX_PIXELS = 40_000_000
"""Default limit: WebP, which needs the most memory, then takes less than a gigabyte."""
ADD_SIZE = "add `--size N` to scale the shorter side to N and cut out the middle"

_BYTES_PER_PIXEL = 3
"""A file has at most as many, as uncompressed RGB has."""
_BYTES_BESIDE = 2**20
"""Of a header, metadata and a preview."""
_MAX_REASON = 200
"""Letters of a decoder's error: some quote the file."""
_DRAFT_GAP = 3
"""A JPEG is decoded at this multiple of its final size or more; then one can hardly tell it from
one that was decoded at full size (the argument `reducing_gap` of Pillow's `resize`)."""
_JPEG_HEADER = 1024
"""Bytes that hold the frame header of a JPEG that `encode_pixels` wrote."""
_TILE_WIDTH, _TILE_HEIGHT = 322, 323
"""Tags of TIFF."""
_SAVE_OPTIONS: dict[str, dict[str, Any]] = {
    # Run-length and Huffman coding of the filtered rows: of photographs as small as level 6 of
    # zlib in a third of its time, of drawings smaller.
    "png": {"compress_type": 3},
    "webp": {"lossless": True, "quality": 0, "method": 0},
    "jpeg": {"subsampling": 0},
}
_HEADER = threading.Lock()
_pillow_open = Image.open


@dataclass(frozen=True)
class ImageLimits:
    """What is refused before it is decoded, and the size that is needed of the rest.

    Args:
        pixels: Most pixels of an image.
        side: Most pixels of a side, for images that are not scaled; None is any number.
        scaled_to: The side that images are scaled to; None if they are not.
    """

    pixels: int = MAX_PIXELS
    side: int | None = None
    scaled_to: int | None = None

    @property
    def bytes(self) -> int:
        """Most bytes of a file."""
        return _BYTES_PER_PIXEL * self.pixels + _BYTES_BESIDE

    def check_bytes(self, size: int, name: str) -> None:
        """Check the size of a file.

        Raises:
            UserError: It is larger than an image of that many pixels can be.
        """
        if size > self.bytes:
            raise UserError(
                f"{name} has {size:,} bytes, more than {_BYTES_PER_PIXEL} for each of --max-pixels "
                f"{self.pixels:,}: raise that, or make the file smaller."
            )

    def check(self, width: int, height: int, name: str) -> None:
        """Check the size of an image.

        Raises:
            UserError: It is too large.
        """
        if width * height > self.pixels:
            self.refuse(f"{width} × {height} pixels", name)
        if self.side is not None and max(width, height) > self.side:
            raise UserError(
                f"{name} is {width} × {height}, and sides are {MIN_SIDE} to {MAX_SIDE}: {ADD_SIZE}."
            )

    def refuse(self, size: str, name: str) -> None:
        """Raise the error of an image with too many pixels."""
        raise UserError(
            f"{name} has {size}, more than --max-pixels {self.pixels:,}: raise that, or make the "
            "image smaller."
        )


class MemoryBudget:
    """An amount that threads share: one that needs what others hold waits for it."""

    def __init__(self, total: int):
        self.total, self._held = total, 0
        self._changed = threading.Condition()

    @contextmanager
    def reserve(self, amount: int) -> Iterator[None]:
        """Hold an amount meanwhile, at most the total."""
        amount = min(amount, self.total)
        with self._changed:
            self._changed.wait_for(lambda: self._held + amount <= self.total)
            self._held += amount
        try:
            yield
        finally:
            with self._changed:
                self._held -= amount
                self._changed.notify_all()


class BrokenImageError(UserError):
    """One image of a source cannot be read, whatever the settings.

    Args:
        name: What error messages call the image.
        reason: What is wrong with it, in parentheses after the name.
        remedy: What to do about it.
    """

    def __init__(self, name: str, reason: str, remedy: str = "repair or remove it"):
        self.name, self.reason = name, reason[:_MAX_REASON]
        super().__init__(f"{name} cannot be read as an image ({self.reason}): {remedy}.")


@contextmanager
def decoder_errors(name: str) -> Iterator[None]:
    """Turn whatever a decoder raises into a BrokenImageError, which names the file."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:
        reason = f"it is none of {', '.join(FORMATS)}"
        raise BrokenImageError(name, reason, "convert or remove it") from error
    except Exception as error:  # also MemoryError, struct.error and zlib.error
        raise BrokenImageError(name, first_error_line(error)) from error


def open_image(data: bytes, name: str, limits: ImageLimits) -> ImageFile.ImageFile:
    """Read the header of an image file; `load_image` decodes its pixels.

    Raises:
        UserError: It is too large, of no listed format, or damaged.
    """
    limits.check_bytes(len(data), name)
    if not data:
        raise BrokenImageError(name, "it is empty")
    with decoder_errors(name), _HEADER:
        # Pillow's own limit: some decoders allocate when they are opened. Up to twice the limit
        # it only warns.
        before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, limits.pixels
        try:
            image = _pillow_open(BytesIO(data), formats=FORMATS)
        except Image.DecompressionBombError as error:
            found = re.search(r"\((\d+) pixels\)", str(error))
            limits.refuse(f"{int(found[1]):,} pixels" if found else "pixels", name)
            raise  # never reached
        finally:
            Image.MAX_IMAGE_PIXELS = before
    limits.check(*image.size, name)
    tags = getattr(image, "tag_v2", {})
    tile = tags.get(_TILE_WIDTH), tags.get(_TILE_HEIGHT)  # is decoded whole, and may be larger
    if isinstance(tile[0], int) and isinstance(tile[1], int):
        ImageLimits(limits.pixels).check(tile[0], tile[1], f"A tile of {name}")
    if limits.scaled_to:  # JPEG alone can be decoded at a half, a quarter or an eighth of its size
        side = _DRAFT_GAP * limits.scaled_to
        image.draft(None, (side, side))
    return image


def load_image(image: ImageFile.ImageFile, name: str) -> Image.Image:
    """Decode the pixels of an image that was opened, rotated as its EXIF data says.

    Raises:
        UserError: It is damaged, holds several frames, or has more than 8 bits a channel in
            several channels (in one, Pillow keeps them all).
    """
    with decoder_errors(name), image:
        # A phone's MPO is one photograph and a preview.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > 1:
            remedy = "save each as an image of its own"
            raise BrokenImageError(name, f"it holds {frames} frames", remedy)
        # Pillow silently keeps the high byte of 16-bit RGB; only the tile shows it.
        # (BGR;16 has 5 or 6 bits a channel, all of which are kept.)
        deep = any(";16" in str(tile[3]) and "BGR;16" not in str(tile[3]) for tile in image.tile)
        if deep and image.mode[0] not in "IF":
            raise UserError(
                f"{name} has more than 8 bits in each of several channels: convert it to 8 bits."
            )
        ImageOps.exif_transpose(image, in_place=True)
        return image


def decode_image(data: bytes, name: str, limits: ImageLimits) -> Image.Image:
    """Open and load an image file.

    Raises:
        UserError: As `open_image` and `load_image`.
    """
    return load_image(open_image(data, name, limits), name)


@contextmanager
def limited_pillow(name: str, limits: ImageLimits) -> Iterator[None]:
    """Have `PIL.Image.open` obey the limits meanwhile: torchvision's datasets call it."""

    def opened(file: str | Path | IO[bytes], *_: Any, **__: Any) -> Image.Image:
        if isinstance(file, str | os.PathLike):
            limits.check_bytes(Path(file).stat().st_size, name)
            return open_image(Path(file).read_bytes(), name, limits)
        return open_image(file.read(limits.bytes + 1), name, limits)

    before, Image.open = Image.open, opened  # type: ignore[assignment]
    try:
        with decoder_errors(name):
            yield
    finally:
        Image.open = before


def encode_pixels(
    pixels: NDArray[np.uint8], encoding: Encoding, quality: int = JPEG_QUALITY
) -> bytes:
    """Return an image [H, W, C], C 1 or 3, as it is stored; `quality` is of JPEG, 1 to 100."""
    if encoding == "raw":
        return pixels.tobytes()
    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    stream = BytesIO()
    image.save(stream, encoding, **{"quality": quality, **_SAVE_OPTIONS[encoding]})
    return stream.getvalue()


def decode_pixels(
    data: bytes, encoding: Encoding, shape: tuple[int, int, int]
) -> NDArray[np.uint8]:
    """Decode an image that `encode_pixels` returned to [H, W, C]; other bytes do no harm.

    Raises:
        ValueError: They are damaged, of another format or of another shape, which is told before
            any pixel is decoded.
    """
    height, width, channels = shape
    if encoding == "raw":
        return np.frombuffer(data, np.uint8).reshape(shape)
    mode = "L" if channels == 1 and encoding != "webp" else "RGB"  # WebP has no greyscale
    frame = struct.pack(">HHBHHB", 0xFFC0, 8 + 3 * channels, 8, height, width, channels)
    if encoding == "jpeg" and frame in data[:_JPEG_HEADER]:
        # Without Pillow's own parser, a fifth less time; that one says below what is wrong.
        with contextlib.suppress(Exception):
            image = Image.frombytes(mode, (width, height), data, "jpeg", mode, "")
            return np.asarray(image).reshape(shape)
    try:
        image = _pillow_open(BytesIO(data), formats=(encoding.upper(),))
        if image.size != (width, height) or image.mode != mode:
            found = f"{image.width} × {image.height}, {image.mode}"
            raise ValueError(f"it is {found}, and not {width} × {height}, {mode}")
        return np.asarray(image).reshape(height, width, -1)[..., :channels]
    except UnidentifiedImageError as error:
        raise ValueError(f"it is not {encoding.upper()}") from error
    except Exception as error:  # also SyntaxError, struct.error, zlib.error and MemoryError
        raise ValueError(first_error_line(error)) from error
