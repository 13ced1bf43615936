from pathlib import Path
from typing import Any

import pytest
from helpers.run_folder import save_run, trained_run


@pytest.fixture(scope="session")
def some_digits(make_digits: Any) -> str:
    """A dataset of 2,040 labelled digits: two row groups, the second one short."""
    return make_digits(2040)


@pytest.fixture(scope="session")
def trained(make_digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with one checkpoint."""
    return save_run(trained_run(make_digits(64)), tmp_path_factory.mktemp("runs"), step=2)
