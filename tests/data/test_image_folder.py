"""Folders of image files: their splits and classes, the forms of images, and what is refused."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import labels_of
from helpers.random_images import WriteSource, pixels, read_sorted, save
from PIL import Image

from cl_ray.data.dataset import Dataset
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.sources import write_dataset


def test_folder_with_classes(tmp_path: Path, write_source: WriteSource) -> None:
    stored = pixels(12)
    names = [f"{kind}/{number}.png" for kind in ("ant", "bee", "cat") for number in range(4)]
    for name, image in zip(names, stored, strict=True):
        save(tmp_path / "in" / name, image)
    save(tmp_path / "in" / ".cache" / "x.png", stored[0])
    save(tmp_path / "in" / "__MACOSX" / "x.png", stored[0])
    (tmp_path / "in" / "ant" / ".DS_Store").write_bytes(b"x")
    (tmp_path / "in" / "readme.txt").write_text("x")
    info, rows = write_source(tmp_path / "in")
    assert np.array_equal(rows.image[..., 0], stored)
    assert labels_of(rows).tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert (info.classes, info.source, info.name) == (
        ["ant", "bee", "cat"],
        f"{tmp_path}/in",
        "set",
    )
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


def test_folder_with_splits(tmp_path: Path, write_source: WriteSource) -> None:
    stored = pixels(6, 30, 30, 3)
    names = ("train/a/1", "train/b/1", "train/b/deep/2", "test/b/1", "valid/a/1", "valid/b/1")
    for name, image in zip(names, stored, strict=True):
        save(tmp_path / "in" / f"{name}.png", image)
    info, rows = write_source(tmp_path / "in")
    assert {split: part.rows for split, part in info.splits.items()} == {
        "train": 3, "validation": 2, "test": 1,
    }  # fmt: skip
    assert list(info.splits) == ["train", "validation", "test"]
    assert np.array_equal(rows.image, stored[:3])
    assert labels_of(rows).tolist() == [0, 1, 1]
    test = read_sorted(Dataset.open(str(tmp_path / "made" / "set")), "test")
    assert np.array_equal(test.image, stored[3:4])
    assert labels_of(test).tolist() == [1]


def test_size_scales_the_shorter_side_and_cuts_the_middle(
    tmp_path: Path, write_source: WriteSource
) -> None:
    wide = np.zeros((64, 128), np.uint8)
    wide[:, 32:96] = 200  # the middle square
    tall = np.full((96, 32), 10, np.uint8)
    tall[32:64] = np.arange(32) * 8
    save(tmp_path / "in" / "1.png", wide)
    save(tmp_path / "in" / "2.png", tall)
    _, rows = write_source(tmp_path / "in", size=32)
    assert rows.image.shape == (2, 32, 32, 1)
    assert rows.image[0].min() > 180  # the filter reaches a little over the edge
    assert np.array_equal(rows.image[1, ..., 0], tall[32:64])  # the right size is left untouched


def test_size_is_antialiased(tmp_path: Path, write_source: WriteSource) -> None:
    stripes = np.zeros((280, 280), np.uint8)
    stripes[:, ::2] = 255
    save(tmp_path / "in" / "1.png", stripes)
    _, rows = write_source(tmp_path / "in", size=28)
    assert abs(rows.image.astype(int) - 127.5).max() < 12


def test_size_refusals_name_the_first_such_file(
    tmp_path: Path, refused: Callable[..., str]
) -> None:
    for k in range(4):
        save(tmp_path / "mixed" / f"{k}.png", pixels(1, 28, 28)[0])
    save(tmp_path / "mixed" / "2.png", pixels(1, 31, 30)[0])
    message = refused(tmp_path / "mixed")
    assert f"{tmp_path}/mixed/2.png is 30 × 31 and {tmp_path}/mixed/0.png is 28 × 28" in message
    assert "`--size N` to scale the shorter side to N and cut out the middle" in message
    save(tmp_path / "oblong" / "0.png", pixels(1, 31, 30)[0])
    assert "0.png is not square but 30 × 31: add `--size N`" in refused(tmp_path / "oblong")
    save(tmp_path / "large" / "0.png", pixels(1, 288, 288)[0])
    assert "0.png is 288 × 288, and sides are 28 to 256" in refused(tmp_path / "large")


def test_grey_and_colour(
    tmp_path: Path, write_source: WriteSource, refused: Callable[..., str]
) -> None:
    grey = save(tmp_path / "in" / "1.png", pixels(1, 28, 28)[0])
    color = save(tmp_path / "in" / "2.png", pixels(1, 28, 28, 3)[0])
    message = refused(tmp_path / "in")
    assert "2.png is in colour and" in message
    assert "1.png is grey: add `--color grey` or `--color rgb`" in message
    _, rows = write_source(tmp_path / "in", color="rgb")
    assert np.array_equal(rows.image[0], np.repeat(grey[..., None], 3, axis=2))
    assert np.array_equal(rows.image[1], color)
    _, rows = write_source(tmp_path / "in", color="grey")
    luma = color @ [0.299, 0.587, 0.114]
    assert np.array_equal(rows.image[0, ..., 0], grey)
    assert abs(rows.image[1, ..., 0] - luma).max() <= 1


def test_other_modes_that_lose_nothing(tmp_path: Path, write_source: WriteSource) -> None:
    few = pixels(1, 28, 28, 3)[0] // 128 * 255  # 8 colours: a palette holds them
    bits = pixels(1, 28, 28)[0] // 128 * 255
    save(tmp_path / "in" / "1.png", few, "RGBA")
    save(tmp_path / "in" / "2.gif", few)
    save(tmp_path / "in" / "3.webp", few, lossless=True)
    _, rows = write_source(tmp_path / "in")
    assert all(np.array_equal(image, few) for image in rows.image)
    with Image.open(tmp_path / "in" / "2.gif") as image:
        assert image.mode == "P"
    save(tmp_path / "grey" / "1.png", bits, "1")
    save(tmp_path / "grey" / "2.png", bits, "LA")
    save(tmp_path / "grey" / "3.tif", bits)
    _, rows = write_source(tmp_path / "grey")
    assert rows.image.shape[3] == 1
    assert all(np.array_equal(image[..., 0], bits) for image in rows.image)


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

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 28, 28, 16, {1: 0, 3: 2}[channels], 0, 0, 0)
    rows = zlib.compress((b"\0" + bytes(range(28 * channels)) * 2) * 28)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    )


def test_images_refused_by_name(tmp_path: Path, refused: Callable[..., str]) -> None:
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
    path = alone("film.gif")
    frames = [Image.fromarray(image) for image in pixels(3)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    message = refused(path.parent)
    assert f"{path} cannot be read as an image (it holds 3 frames): save each as an" in message
    assert message.endswith(", or leave it out with `--skip-broken`.")


def test_all_broken_files_are_named_at_once(
    tmp_path: Path,
    write_source: WriteSource,
    refused: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
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
    capsys.readouterr()
    _, rows = write_source(tmp_path / "in", skip_broken=True)
    assert np.array_equal(rows.image[..., 0], stored)
    made = tmp_path / "made" / "set"
    note = f"Left out: 3 broken images, listed in {made}/skipped.txt.\n"
    assert capsys.readouterr().out == note
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


def test_transparent_images_on_a_background(tmp_path: Path, write_source: WriteSource) -> None:
    clear = np.zeros((28, 28, 4), np.uint8)
    clear[:14] = (200, 100, 0, 255)
    clear[14:20, :, 3] = 51  # a fifth of black
    save(tmp_path / "in" / "1.png", clear)
    _, rows = write_source(tmp_path / "in", background="#ff0080")
    assert (rows.image[0, :14] == (200, 100, 0)).all()
    assert (rows.image[0, 14:20] == (204, 0, 102)).all()
    assert (rows.image[0, 20:] == (255, 0, 128)).all()
    save(tmp_path / "grey" / "1.png", clear[..., 2:], "LA")
    _, rows = write_source(tmp_path / "grey", background="white")
    assert rows.image.shape[3] == 1
    assert (rows.image[0, 20:] == 255).all()
    assert write_source(tmp_path / "grey", background="red")[1].image.shape[3] == 3


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["Train", "Val"], {"train": 2, "validation": 2}),
        (["training", "TESTING"], {"train": 2, "test": 2}),
        (["eval", "dev", "train"], {"train": 2, "validation": 2, "test": 2}),
        (["set/images/train", "set/images/validation"], {"train": 2, "validation": 2}),
        (["set/train/images", "set/test/images"], {"train": 2, "test": 2}),
    ],
)
def test_usual_names_of_splits(
    tmp_path: Path, write_source: WriteSource, folders: list[str], splits: dict[str, int]
) -> None:
    for folder in folders:
        for kind in ("cat", "dog"):
            save(tmp_path / "in" / folder / kind / "1.png", pixels(1)[0])
    info, _ = write_source(tmp_path / "in")
    assert {split: part.rows for split, part in info.splits.items()} == splits
    assert info.classes == ["cat", "dog"]


def test_folders_that_may_be_splits_or_classes(
    tmp_path: Path, write_source: WriteSource, refused: Callable[..., str]
) -> None:
    for kind in ("bus", "train"):
        save(tmp_path / "mixed" / kind / "1.png", pixels(1)[0])
    message = refused(tmp_path / "mixed")
    assert "has the folder train, which is the name of a split, but bus/1.png is in no" in message
    assert "add `--splits none` if its folders are classes" in message
    assert write_source(tmp_path / "mixed", splits="none")[0].classes == ["bus", "train"]
    for kind in ("Test", "val"):
        save(tmp_path / "untrained" / kind / "1.png", pixels(1)[0])
    message = refused(tmp_path / "untrained")
    assert "has no training split but only Test, val: rename a folder to train, or add" in message
    assert write_source(tmp_path / "untrained", splits="none")[0].classes == ["Test", "val"]


def test_all_endings_of_the_formats(
    tmp_path: Path, write_source: WriteSource, capsys: pytest.CaptureFixture[str]
) -> None:
    (stored,) = pixels(1, 28, 28, 3)
    for name in ("1.JPG", "2.jfif", "3.avif", "4.Tif", "5.dib", "6.pnm", "7.apng"):
        save(tmp_path / "in" / name, stored)
    for name in ("a.txt", "b.TXT", "c.heic", "README"):
        (tmp_path / "in" / name).write_text("x")
    _, rows = write_source(tmp_path / "in")
    assert len(rows.image) == 7
    assert "by the endings of their names: 2 .txt, 1 " in capsys.readouterr().out


def test_loose_images_beside_folders(
    tmp_path: Path, write_source: WriteSource, refused: Callable[..., str]
) -> None:
    save(tmp_path / "in" / "a" / "1.png", pixels(1)[0])
    save(tmp_path / "in" / "2.png", pixels(1)[0])
    assert "2.png is in none: move it, or leave the labels out" in refused(tmp_path / "in")
    assert write_source(tmp_path / "in", label_column="none")[1].label is None
