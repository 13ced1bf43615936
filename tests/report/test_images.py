"""Grids of images, and the images cut out of the grids that a run saved."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.reported_run import EPOCHS, run_storage
from PIL import Image
from torchvision.utils import make_grid

import cl_ray
from cl_ray.report.images import (
    GAP,
    ImageGrid,
    epoch_strip,
    image_grid,
    pair_grids,
    read_saved_images,
)
from cl_ray.training.run_logger import uint8_grid


def pixels(grid: ImageGrid) -> np.ndarray:
    kind, _, text = grid.source.partition(",")
    assert kind == "data:image/png;base64"
    opened = np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))
    assert opened.shape[1::-1] == (grid.width, grid.height)
    return opened


def tiles(grid: ImageGrid, side: int) -> np.ndarray:
    """The images of a grid, row by row, without the alpha channel; empty places included."""
    sheet = pixels(grid)
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
    grid = image_grid(images, 3, "Seven images.", "seven")
    assert (grid.width, grid.height) == (3 * 28 + 2 * GAP, 3 * 28 + 2 * GAP)
    assert np.array_equal(tiles(grid, 28)[:7], images)
    sheet = pixels(grid)
    assert (sheet[:28, :28, -1] == 255).all()
    assert (sheet[28:30, :, -1] == 0).all()  # transparent: the page shows through
    assert (sheet[60:, 30:, -1] == 0).all()
    assert (grid.alt, grid.label) == ("Seven images.", "seven")


def test_saved_samples_are_those_of_the_ema_generator(trained: Path) -> None:
    images = read_saved_images(run_storage(trained), "samples", EPOCHS)
    assert images.shape == (64, 28, 28, 1)  # grey
    random, loaded = torch.Generator().manual_seed(0), cl_ray.load(trained)
    assert loaded.prior is not None
    noise, chance = torch.randn(64, 10, generator=random), torch.rand(64, generator=random)
    again = loaded.decode(loaded.prior.transform_noise(noise, chance))
    assert np.abs(images.astype(int) - again.astype(int)).max() <= 1


def test_the_strip_has_a_row_an_epoch(trained: Path) -> None:
    folder = run_storage(trained)
    rows = epoch_strip(folder, max_epochs=12, columns=10)
    assert [row.label for row in rows] == ["1", "2", "3"]
    for row in rows:
        saved = read_saved_images(folder, "samples", int(row.label))
        assert np.array_equal(tiles(row, 28), saved[:10])
    assert [row.label for row in epoch_strip(folder, 2, columns=10)] == ["1", "3"]


def test_pairs_are_in_columns(trained: Path) -> None:
    folder = run_storage(trained)
    images = read_saved_images(folder, "pairs", EPOCHS)
    columns = len(images) // 4
    assert columns * 4 == len(images)  # x+, G(x+), x-, G(x-) of each
    assert columns >= 8
    found = [tiles(grid, 28).reshape(4, -1, 28, 28, 1) for grid in pair_grids(folder, 8, None)]
    by_column = np.concatenate([grid.swapaxes(0, 1) for grid in found])
    assert np.array_equal(by_column.reshape(-1, 28, 28, 1), images)


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (16, 3, 8, 12), (20, 1, 8, 8), (64, 3, 16, 16)])
def test_saved_grids_are_laid_out_as_torchvision_s(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    expected = make_grid((images.clamp(-1, 1) + 1) / 2, nrow=16, pad_value=0.5).mul(255).round()
    assert (uint8_grid(images).float() - expected).abs().max() <= 1


@pytest.mark.parametrize("pairs", [1, 2, 3, 5])
def test_pairs_of_a_small_batch(pairs: int, tmp_path: Path) -> None:
    """Fewer than 16 images make a grid of fewer columns."""
    images = torch.rand(4 * pairs, 1, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    (tmp_path / "samples").mkdir()
    sheet = uint8_grid(images).permute(1, 2, 0).numpy()
    Image.fromarray(sheet).save(tmp_path / "samples" / "pairs-0001.png")
    (grid,) = pair_grids(run_storage(tmp_path), 8, 28)
    found = tiles(grid, 28).reshape(4, pairs, 28, 28).swapaxes(0, 1)
    expected = ((images + 1) * 127.5).round().reshape(pairs, 4, 28, 28).numpy()
    assert np.abs(found - expected).max() <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_a_short_last_row_is_no_image(channels: int, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(20, channels, 28, 28, generator=generator) * 2 - 1
    images[3] = -1  # black all over, yet an image
    sheet = uint8_grid(images).permute(1, 2, 0).numpy()
    (tmp_path / "samples").mkdir()
    Image.fromarray(sheet).save(tmp_path / "samples" / "samples-0001.png")
    again = read_saved_images(run_storage(tmp_path), "samples", 1)
    expected = ((images + 1) * 127.5).round().permute(0, 2, 3, 1).numpy()
    assert again.shape == expected.shape
    assert np.abs(again - expected).max() <= 1


def test_missing_or_damaged_grids_are_left_out(copied: Path) -> None:
    folder = run_storage(copied)
    file = copied / "samples" / "samples-0002.png"
    file.write_bytes(file.read_bytes()[:300])
    (copied / "samples" / "pairs-0003.png").write_text("no PNG")
    assert [row.label for row in epoch_strip(folder, 12, 10)] == ["1", "3"]
    assert pair_grids(folder, 8, 28) == []
    for file in (copied / "samples").iterdir():
        file.unlink()
    assert epoch_strip(folder, 12, 10) == []
    assert pair_grids(folder, 8, 28) == []
