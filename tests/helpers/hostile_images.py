"""Image files that are damaged or made to harm who opens them."""

import io
import random
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from PIL import Image

_FORMATS: list[tuple[str, str, dict[str, object]]] = [
    ("png", "RGB", {}),
    ("png", "P", {"transparency": 0}),
    ("png", "LA", {}),
    ("jpg", "RGB", {}),
    ("jpg", "L", {"progressive": True}),
    ("jpg", "CMYK", {"exif": b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"}),
    ("gif", "P", {}),
    ("bmp", "RGB", {}),
    ("bmp", "P", {}),
    ("tiff", "RGB", {}),
    ("tiff", "RGB", {"compression": "tiff_lzw"}),
    ("tiff", "L", {"compression": "tiff_adobe_deflate"}),
    ("tiff", "RGB", {"compression": "jpeg"}),
    ("webp", "RGB", {}),
    ("webp", "RGBA", {"lossless": True}),
    ("ppm", "RGB", {}),
    ("ppm", "L", {}),
    ("ppm", "1", {}),
    ("avif", "RGB", {}),
    ("avif", "RGBA", {}),
]
_NUMBERS = [0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]
_HEADER = 96
"""Bytes of a file in which most damage is done."""

POSTSCRIPT = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 28 28
%%EndComments
0 0 28 28 rectfill
showpage
%%EOF
"""


def fuzzed_images(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of image files of all formats, damaged mostly in their headers."""
    chance = random.Random(seed)
    pixels = np.random.default_rng(seed).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    for number in range(count):
        suffix, mode, options = _FORMATS[number % len(_FORMATS)]
        stream = io.BytesIO()
        kind = {"jpg": "jpeg"}.get(suffix, suffix)
        Image.fromarray(pixels).convert(mode).save(stream, kind, **options)
        yield f"{number:04}.{suffix}", _damage(stream.getvalue(), chance)


def _damage(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(chance.randint(1, 6)):
        at = chance.randrange(min(_HEADER, len(changed)))
        match chance.randrange(5):
            case 0:
                changed[at] = chance.randrange(256)
            case 1:
                order = chance.choice("<>")
                changed[at : at + 4] = struct.pack(f"{order}I", chance.choice(_NUMBERS))
            case 2:
                changed[at : at + 2] = struct.pack(">H", chance.choice(_NUMBERS) & 0xFFFF)
            case 3:
                changed[at:at] = chance.randbytes(chance.randint(1, 9))
            case 4:
                del changed[chance.randrange(len(changed)) :]
                changed.extend(chance.randbytes(4))
    if changed[:4] == b"\x89PNG" and len(changed) > 33:  # else nothing after the header is read
        changed[29:33] = struct.pack(">I", zlib.crc32(changed[12:29]))
    return bytes(changed)


def png_header(width: int, height: int) -> bytes:
    """Return a grey PNG of a few bytes, whose header announces that many pixels."""
    return png_chunks(
        IHDR=struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0),
        IDAT=zlib.compress(bytes(99)),
        IEND=b"",
    )


def png_chunks(**chunks: bytes) -> bytes:
    """Return a PNG file of chunks."""
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(part))
        + kind.encode()
        + part
        + struct.pack(">I", zlib.crc32(kind.encode() + part))
        for kind, part in chunks.items()
    )


def oversized_images() -> dict[str, bytes]:
    """Return small files by name whose headers announce 4 billion pixels, or 2 billion."""
    side, half = 65535, 32767
    frame = struct.pack("<BHHHHB", 0x2C, 0, 0, side, side, 0)
    dispose = b"\x21\xf9\x04\x08\x00\x00\x00\x00"  # fills the frame when it is opened
    tags = [(256, 40), (257, 40), (258, 8), (259, 8), (262, 1), (277, 1)]
    tags += [(322, 65520), (323, 65520), (324, 150), (325, 9)]
    tiff = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    tiff += b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    webp = struct.pack("<4sII", b"VP8X", 10, 0)
    webp += struct.pack("<I", half)[:3] + struct.pack("<I", side)[:3]
    jpeg = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 11, 8, side, side, 1) + b"\x01\x11\x00"
    return {
        "0.png": png_header(side, side),
        "0.gif": b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + dispose + frame + b"\x02\x00;",
        "0.tiff": tiff + b"\0\0\0\0" + zlib.compress(bytes(99)),
        "0.webp": b"RIFF" + struct.pack("<I", len(webp) + 4) + b"WEBP" + webp,
        "0.jpg": jpeg + b"\xff\xda" + bytes(99),
        "0.bmp": struct.pack("<2sIII", b"BM", 60, 0, 54)
        + struct.pack("<IiiHHIIiiII", 40, side, side, 1, 24, 0, 0, 0, 0, 0, 0),
        "0.ppm": b"P6 %d %d 255\n" % (side, side),
    }
