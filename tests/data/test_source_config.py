"""The settings of `cl-ray data` as flags."""

from typing import Any

import pytest
import tyro

from cl_ray.data.source_config import SourceConfig


def test_config_becomes_flags() -> None:
    flags = "--source MNIST --out x --size 32 --color grey --test-fraction 0.1 --overwrite"
    config = tyro.cli(SourceConfig, args=flags.split())
    assert config == SourceConfig(
        source="MNIST", out="x", size=32, color="grey", test_fraction=0.1, overwrite=True
    )
    # A word of ours, and not tyro's for a missing value.
    flags = "--source MNIST --out x --label-column none"
    assert tyro.cli(SourceConfig, args=flags.split()).label_column == "none"
    wrongs: list[dict[str, Any]] = [
        {"size": 15},
        {"size": 257},
        {"test_fraction": 1.0},
        {"color": "sepia"},
        {"background": "transparency"},
    ]
    for wrong in wrongs:
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SourceConfig(source="MNIST", out="x", **wrong)
