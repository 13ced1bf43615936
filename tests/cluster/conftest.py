from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import machines
from helpers.cloud import Cloud


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cloud]:
    """A fake cloud, where one can be made."""
    reason = machines.missing()
    if reason:
        pytest.skip(reason)
    made = Cloud(tmp_path_factory.mktemp("cloud"))
    try:
        yield made
    finally:
        made.close()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("laptop")
