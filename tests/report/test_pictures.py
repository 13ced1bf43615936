"""Pictures hold the images that they are of, and what the run saved is cut where it was joined."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.reported_run import EPOCHS, folder_of
from PIL import Image

import cl_ray
from cl_ray.report.pictures import GAP, ImageGrid, image_grid, pairs, saved, strip
from cl_ray.training.run_logger import _picture


def pixels(made: ImageGrid) -> np.ndarray:
    kind, _, text = made.source.partition(",")
    assert kind == "data:image/png;base64"
    opened = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    assert opened.shape[1::-1] == (made.width, made.height)
    return opened


def tiles(made: ImageGrid, side: int) -> np.ndarray:
    """The images of a picture, row by row, without transparency; those that are not there too."""
    sheet = pixels(made)
    pitch = side + GAP
    rows, columns = (sheet.shape[0] + GAP) // pitch, (sheet.shape[1] + GAP) // pitch
    return np.array(
        [
            sheet[r * pitch : r * pitch + side, c * pitch : c * pitch + side, :-1]
            for r in range(rows)
            for c in range(columns)
        ]
    )


@pytest.mark.parametrize("channels", [1, 3])
def test_images_are_laid_out_row_by_row(channels: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 28, 28, channels), np.uint8)
    made = image_grid(images, 3, "Seven images.", "seven")
    assert (made.width, made.height) == (3 * 28 + 2 * GAP, 3 * 28 + 2 * GAP)
    assert np.array_equal(tiles(made, 28)[:7], images)
    sheet = pixels(made)
    assert (sheet[:28, :28, -1] == 255).all()
    assert (sheet[28:30, :, -1] == 0).all()  # the page shows through
    assert (sheet[60:, 30:, -1] == 0).all()
    assert (made.alt, made.label) == ("Seven images.", "seven")


def test_saved_samples_are_those_of_the_averaged_generator(trained: Path) -> None:
    folder = folder_of(trained)
    images = saved(folder, "samples", EPOCHS)
    assert images.shape == (64, 28, 28, 3)
    random, loaded = torch.Generator().manual_seed(0), cl_ray.load(trained)
    assert loaded.prior is not None
    noise, chance = torch.randn(64, 10, generator=random), torch.rand(64, generator=random)
    again = loaded.decode(loaded.prior.place(noise, chance))
    assert np.abs(images[..., :1].astype(int) - again.astype(int)).max() <= 1


def test_the_strip_has_a_row_an_epoch(trained: Path) -> None:
    folder = folder_of(trained)
    rows = strip(folder, most=12, columns=10)
    assert [row.label for row in rows] == ["1", "2", "3"]
    for row in rows:
        epoch = saved(folder, "samples", int(row.label))
        assert np.array_equal(tiles(row, 28), epoch[:10, :, :, :1])
    assert [row.label for row in strip(folder, most=2, columns=10)] == ["1", "3"]


def test_pairs_stand_in_columns(trained: Path) -> None:
    folder = folder_of(trained)
    images = saved(folder, "pairs", EPOCHS)
    columns = len(images) // 4
    assert columns * 4 == len(images)  # x+, G(x+), x-, G(x-) of each
    found = [tiles(block, 28).reshape(4, -1, 28, 28, 1) for block in pairs(folder, 8)]
    by_column = np.concatenate([block.swapaxes(0, 1) for block in found])
    assert np.array_equal(by_column.reshape(-1, 28, 28, 1), images[..., :1])
    assert columns >= 8


def test_a_short_last_row_is_no_image(tmp_path: Path) -> None:
    images = torch.rand(20, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images[3] = -1  # black all over, yet an image
    sheet = _picture(images, columns=16).permute(1, 2, 0).numpy()
    (tmp_path / "samples").mkdir()
    Image.fromarray(sheet).save(tmp_path / "samples" / "samples-0001.png")
    again = saved(folder_of(tmp_path), "samples", 1)
    expected = ((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert again.shape == (20, 28, 28, 3)
    assert np.abs(again[..., :1] - expected).max() <= 1


def test_nothing_saved_or_damaged_is_nothing_shown(copied: Path) -> None:
    folder = folder_of(copied)
    file = copied / "samples" / "samples-0002.png"
    file.write_bytes(file.read_bytes()[:300])
    (copied / "samples" / "pairs-0003.png").write_text("no picture")
    assert [row.label for row in strip(folder, 12, 10)] == ["1", "3"]
    assert pairs(folder, 8) == []
    for file in (copied / "samples").iterdir():
        file.unlink()
    assert strip(folder, 12, 10) == []
    assert pairs(folder, 8) == []
