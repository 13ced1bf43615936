"""Folders of image files: their splits and classes, the forms of images, and what is refused."""

import struct
import zlib
from pathlib import Path

import numpy as np
from helpers.datasets import labels_of
from helpers.hostile_images import png_chunks
from helpers.random_images import Refused, WriteSource, pixels, read_sorted, save
from PIL import Image

from cl_ray.data.dataset import Dataset
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset


def test_folder_with_classes(tmp_path: Path, write_source: WriteSource) -> None:
    stored = pixels(12)
    names = [f"{kind}/{number}.png" for kind in ("ant", "bee", "cat") for number in range(4)]
    for name, image in zip(names, stored, strict=True):
        save(tmp_path / "in" / name, image)
    info, rows = write_source(tmp_path / "in")
    assert np.array_equal(rows.image[..., 0], stored)
    assert labels_of(rows).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert info.classes == ["ant", "bee", "cat"]
    assert (info.source, info.name) == (f"{tmp_path}/in", "set")
    mixed = labels_of(Dataset.open(str(tmp_path / "made" / "set")).read("train"))
    assert mixed.tolist() != sorted(mixed.tolist())


def test_folder_without_classes_as_uri(tmp_path: Path) -> None:
    stored = [save(tmp_path / "in" / f"{k:02}.bmp", image) for k, image in enumerate(pixels(11))]
    out = f"file://{tmp_path}/out/set"
    info = write_dataset(SourceConfig(source=f"file://{tmp_path}/in", out=out, licence="CC0"))
    rows = read_sorted(Dataset.open(out))
    assert (info.labelled, info.classes, info.licence) == (False, None, "CC0")
    assert rows.label is None
    assert np.array_equal(rows.image[..., 0], stored)


def test_photographs_are_turned_as_they_say(tmp_path: Path, write_source: WriteSource) -> None:
    array = np.full((28, 28), 250, np.uint8)
    array[:8] = 0
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter
    save(tmp_path / "in" / "1.jpg", array, exif=exif, quality=100)
    _, rows = write_source(tmp_path / "in")
    assert rows.image[0, :, -8:].max() < 10
    assert rows.image[0, :, :-8].min() > 240


def png16(channels: int) -> bytes:
    """Returns a 28 × 28 PNG of 16 bits a channel, which Pillow cannot write for RGB."""
    header = struct.pack(">IIBBBBB", 28, 28, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = (b"\0" + bytes(range(28 * channels)) * 2) * 28
    return png_chunks(IHDR=header, IDAT=zlib.compress(rows), IEND=b"")


def test_images_refused_by_name(tmp_path: Path, refused: Refused) -> None:
    def alone(name: str) -> Path:
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        return folder / name

    path = alone("thin.png")
    save(path, np.full((28, 28, 4), 128, np.uint8))
    assert f"{path} is partly transparent: add `--background white`" in refused(path.parent)
    path = alone("deep.png")
    path.write_bytes(png16(1))
    message = refused(path.parent)
    assert f"{path} has more than 8 bits a channel" in message
    assert "add `--scale-depth`" in message
    path.write_bytes(png16(3))
    Image.open(path).load()  # a file that Pillow does read
    for flags in ({}, {"scale_depth": True}):
        message = refused(path.parent, **flags)
        assert f"{path} has more than 8 bits in each of several channels: convert it" in message
    path = alone("print.jpg")
    save(path, pixels(1, 28, 28, 3)[0], "CMYK")
    assert f"{path} is stored as CMYK: add `--color rgb`" in refused(path.parent)
    path = alone("none.ppm")
    path.write_bytes(b"P6 0 5 255\n")
    assert f"{path} cannot be read as an image" in refused(path.parent, size=28)
    path = alone("film.gif")
    frames = [Image.fromarray(image) for image in pixels(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    message = refused(path.parent)
    assert f"{path} cannot be read as an image (it holds 3 frames): save each as an" in message
    assert message.endswith(", or leave it out with `--skip-broken`.")


def test_all_broken_files_are_named_at_once(
    tmp_path: Path, write_source: WriteSource, refused: Refused, notes: list[str]
) -> None:
    stored = [save(tmp_path / "in" / f"{k}.png", image) for k, image in enumerate(pixels(3))]
    save(tmp_path / "in" / "cut.png", stored[0])
    content = (tmp_path / "in" / "cut.png").read_bytes()
    (tmp_path / "in" / "cut.png").write_bytes(content[:300])
    (tmp_path / "in" / "0-empty.png").write_bytes(b"")
    (tmp_path / "in" / "text.jpg").write_text("<html>404</html>")
    message = refused(tmp_path / "in")
    assert message.startswith(f"3 of 6 images cannot be read: {tmp_path}/in/0-empty.png (it is em")
    assert f"; {tmp_path}/in/cut.png (" in message
    assert f"; {tmp_path}/in/text.jpg (it is none of " in message
    assert "or leave them out with `--skip-broken`" in message
    _, rows = write_source(tmp_path / "in", skip_broken=True)
    assert np.array_equal(rows.image[..., 0], stored)
    made = tmp_path / "made" / "set"
    assert notes == [f"Left out: 3 broken images, listed in {made}/skipped.txt."]
    lines = (made / "skipped.txt").read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == [
        f"{tmp_path}/in/{name}" for name in ("0-empty.png", "cut.png", "text.jpg")
    ]
    write_source(made)  # over itself, so the list is gone
    assert not (made / "skipped.txt").exists()
    for k in range(3):
        (tmp_path / "in" / f"{k}.png").unlink()
    assert refused(tmp_path / "in").startswith("3 of 3 images cannot be read")
    assert "There is no image in the split train" in refused(tmp_path / "in", skip_broken=True)


def test_all_endings_of_the_formats(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    (stored,) = pixels(1, 28, 28, 3)
    for name in ("1.JPG", "2.jfif", "3.avif", "4.Tif", "5.dib", "6.pnm", "7.apng"):
        save(tmp_path / "in" / name, stored)
    for name in ("a.txt", "b.TXT", "c.heic", "README"):
        (tmp_path / "in" / name).write_text("x")
    _, rows = write_source(tmp_path / "in")
    assert len(rows.image) == 7
    assert notes[0].startswith("Left out, by the endings of their names: 2 .txt, 1 ")
