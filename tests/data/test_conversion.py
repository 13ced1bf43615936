"""Images become pixels: size, colour, transparency, and more than 8 bits mapped to 8."""

from pathlib import Path

import numpy as np
from helpers.random_images import Refused, WriteSource, pixels, save, smooth_images
from PIL import Image, ImageOps

from cl_ray.data.decoding import ImageLimits, load_image, open_image


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


def test_large_jpegs_are_decoded_at_part_of_their_size(
    tmp_path: Path, write_source: WriteSource
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn right by a quarter
    (large,) = smooth_images(1, 640)
    for ending, options in (("jpg", {"quality": 95, "exif": exif}), ("png", {"exif": exif})):
        save(tmp_path / ending / f"1.{ending}", large, **options)
    image = open_image(
        (tmp_path / "jpg" / "1.jpg").read_bytes(), "1.jpg", ImageLimits(scaled_to=48)
    )
    assert load_image(image, "1.jpg").size == (160, 160)
    jpeg, png = (write_source(tmp_path / e, size=48)[1].image.astype(int) for e in ("jpg", "png"))
    assert np.abs(jpeg - png).max() <= 3
    exact = ImageOps.fit(Image.fromarray(np.rot90(large, -1)), (48, 48), Image.Resampling.LANCZOS)
    assert np.array_equal(png[0], np.asarray(exact))


def test_size_refusals_name_the_first_such_file(tmp_path: Path, refused: Refused) -> None:
    for k in range(4):
        save(tmp_path / "mixed" / f"{k}.png", pixels(1, 28, 28)[0])
    save(tmp_path / "mixed" / "2.png", pixels(1, 31, 30)[0])
    message = refused(tmp_path / "mixed")
    assert f"{tmp_path}/mixed/2.png is 30 × 31 and {tmp_path}/mixed/0.png is 28 × 28" in message
    assert "`--size N` to scale the shorter side to N and cut out the middle" in message
    save(tmp_path / "oblong" / "0.png", pixels(1, 31, 30)[0])
    assert "0.png is not square but 30 × 31: add `--size N`" in refused(tmp_path / "oblong")
    save(tmp_path / "large" / "0.png", pixels(1, 288, 288)[0])
    assert "0.png is 288 × 288, and sides are 16 to 256" in refused(tmp_path / "large")


def test_grey_and_colour(tmp_path: Path, write_source: WriteSource, refused: Refused) -> None:
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


def test_all_images_are_mapped_alike(
    tmp_path: Path, write_source: WriteSource, notes: list[str]
) -> None:
    dark = np.full((28, 28), 100, np.uint16)
    bright = np.full((28, 28), 4196, np.uint16)
    bright[0, 0] = 2148
    save(tmp_path / "in" / "train" / "a" / "1.tif", dark)
    save(tmp_path / "in" / "test" / "a" / "2.png", bright)
    _, rows = write_source(tmp_path / "in", scale_depth=True)
    assert (rows.image == 0).all()
    assert notes == ["The pixels 100 to 4196 are mapped to 0 to 255."]
    save(tmp_path / "in" / "train" / "a" / "3.tif", bright)
    _, rows = write_source(tmp_path / "in", scale_depth=True)
    assert rows.image[1, 0, 0, 0] == 128  # 127.5, rounded to even
    assert (rows.image[1, 1:] == 255).all()


def test_floats_are_mapped(tmp_path: Path, write_source: WriteSource) -> None:
    values = np.linspace(-1, 1, 28 * 28, dtype=np.float32).reshape(28, 28)
    save(tmp_path / "in" / "1.tif", values)
    _, rows = write_source(tmp_path / "in", scale_depth=True)
    assert abs(rows.image[0, ..., 0] - (values + 1) * 127.5).max() <= 0.51


def test_depth_refused(tmp_path: Path, refused: Refused) -> None:
    save(tmp_path / "in" / "1.png", pixels(1)[0])
    assert "No image has more than 8 bits a channel" in refused(tmp_path / "in", scale_depth=True)
    deep = np.full((28, 28), 9, np.uint16)
    save(tmp_path / "in" / "2.png", deep)
    message = refused(tmp_path / "in", scale_depth=True)
    assert "2.png has more than 8 bits a channel and" in message
    assert "1.png has not" in message
    (tmp_path / "in" / "1.png").unlink()
    assert "All pixels are 9: --scale" in refused(tmp_path / "in", scale_depth=True)
    save(tmp_path / "in" / "3.tif", np.full((28, 28), np.nan, np.float32))
    assert "3.tif has pixels that are NaN or Inf" in refused(tmp_path / "in", scale_depth=True)
