"""Images of more than 8 bits a channel, mapped to 8 bits."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.random_images import WriteSource, pixels, save


def test_all_images_are_mapped_alike(
    tmp_path: Path, write_source: WriteSource, capsys: pytest.CaptureFixture[str]
) -> None:
    dark = np.full((28, 28), 100, np.uint16)
    bright = np.full((28, 28), 4196, np.uint16)
    bright[0, 0] = 2148
    save(tmp_path / "in" / "train" / "a" / "1.tif", dark)
    save(tmp_path / "in" / "test" / "a" / "2.png", bright)
    _, rows = write_source(tmp_path / "in", scale_depth=True)
    assert (rows.image == 0).all()
    printed = capsys.readouterr().out
    assert printed == "The pixels 100 to 4196 are mapped to 0 to 255.\n"
    save(tmp_path / "in" / "train" / "a" / "3.tif", bright)
    _, rows = write_source(tmp_path / "in", scale_depth=True)
    assert rows.image[1, 0, 0, 0] == 128  # 127.5, rounded to even
    assert (rows.image[1, 1:] == 255).all()


def test_floats_are_mapped(tmp_path: Path, write_source: WriteSource) -> None:
    values = np.linspace(-1, 1, 28 * 28, dtype=np.float32).reshape(28, 28)
    save(tmp_path / "in" / "1.tif", values)
    _, rows = write_source(tmp_path / "in", scale_depth=True)
    assert abs(rows.image[0, ..., 0] - (values + 1) * 127.5).max() <= 0.51


def test_depth_refused(tmp_path: Path, refused: Callable[..., str]) -> None:
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
