"""A run of the style-based family from `cl-ray train` to `cl-ray generate --truncation`."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from helpers.small_run import SMALL

import cl_ray
from cl_ray.cli import main


def test_truncation_as_it_is_typed(some_digits: str, tmp_path: Path) -> None:
    run = tmp_path / "styled"
    style = ["--generator.family=style", "--discriminator.family=style", "--generator.depth=2"]
    common = [f"--data={some_digits}", f"--storage={tmp_path}", "--name=styled"]
    main(["train", *common, *SMALL, *style, "--epochs=1", "--evaluation.every=0"])
    loaded = cl_ray.load(run)
    assert loaded.config.generator.family == "style"
    spread = []
    for number in ("1", "0.3"):
        out = tmp_path / f"at{number}.parquet"
        flags = ["--count=60", "--seed=4", f"--truncation={number}", "--actors=1"]
        main(["generate", str(run), *flags, f"--out={out}"])
        images = pq.read_table(out)["image"].combine_chunks().to_numpy_ndarray().astype(int)
        expected = loaded.generate(60, seed=4, truncation=float(number))
        assert np.abs(images - expected).max() <= 1
        spread.append(images.std(0).mean())
    assert 0 < spread[1] < spread[0]
