"""The metrics that are known beforehand are those that an epoch gives."""

from typing import Any

import pytest
from helpers.run_folder import trained_run

from cl_ray.losses.names import loss_names

NONE = dict.fromkeys(("approximate_r1", "contrastive", "pair", "pair_confusion", "uniformity"), 0)


@pytest.fixture(scope="module")
def digits(make_digits: Any) -> str:
    return make_digits(40)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"losses": NONE},
        {"losses": {"form": "contrad"}},
        {"losses": {"form": "contrad", "fakes": 0}},
        {"losses": {"r1": 1, "r2": 1, "gradient_penalty": 1}},
        {"condition": "classifier"},
        {"condition": "projection"},
    ],
)
def test_the_names_are_those_of_an_epoch(digits: str, fields: dict[str, Any]) -> None:
    run = trained_run(digits, **fields)
    there = [name for name in run.train_epoch() if "/" in name]
    assert there == loss_names(run.config)
