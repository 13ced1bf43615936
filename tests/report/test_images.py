"""Grids of images, and those that a run saved."""

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
from cl_ray.report.images import GAP, ImageGrid, epoch_strip, image_grid, last_pairs
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


def saved_samples(folder: Path, epoch: int) -> np.ndarray:
    """The 64 grey images of 28 x 28 that a run saved after an epoch."""
    sheet = np.asarray(Image.open(folder / "samples" / f"samples-{epoch:04d}.png"))[GAP:, GAP:]
    cells = sheet[..., :1].reshape(4, 28 + GAP, 16, 28 + GAP, 1)
    return cells[:, :28, :, :28].swapaxes(1, 2).reshape(64, 28, 28, 1)


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
    images = saved_samples(trained, EPOCHS)
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
        saved = saved_samples(trained, int(row.label))
        assert np.array_equal(tiles(row, 28)[..., :1], saved[:10])
    assert [row.label for row in epoch_strip(folder, 2, columns=10)] == ["1", "3"]


def test_pairs_are_those_of_the_last_epoch(trained: Path) -> None:
    pairs = last_pairs(run_storage(trained))
    assert pairs is not None
    saved = Image.open(trained / "samples" / f"pairs-{EPOCHS:04d}.png")
    assert np.array_equal(pixels(pairs), np.asarray(saved))


@pytest.mark.parametrize("shape", [(4, 1, 28, 28), (16, 3, 8, 12), (20, 1, 8, 8), (64, 3, 16, 16)])
def test_saved_grids_are_laid_out_as_torchvision_s(shape: tuple[int, ...]) -> None:
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1
    expected = make_grid((images.clamp(-1, 1) + 1) / 2, nrow=16, pad_value=0.5).mul(255).round()
    assert (uint8_grid(images).float() - expected).abs().max() <= 1


def test_missing_or_damaged_grids_are_left_out(copied: Path) -> None:
    folder = run_storage(copied)
    file = copied / "samples" / "samples-0002.png"
    file.write_bytes(file.read_bytes()[:300])
    (copied / "samples" / "pairs-0003.png").write_text("no PNG")
    assert [row.label for row in epoch_strip(folder, 12, 10)] == ["1", "3"]
    assert last_pairs(folder) is None
    for file in (copied / "samples").iterdir():
        file.unlink()
    assert epoch_strip(folder, 12, 10) == []
    assert last_pairs(folder) is None
