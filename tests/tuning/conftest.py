"""Flags of searches that end in seconds."""

from pathlib import Path

import pytest
from helpers.small_search import CONFIG, SPACE


@pytest.fixture(scope="session")
def flags(tmp_path_factory: pytest.TempPathFactory, digits: str) -> list[str]:
    """Flags of the data, the config and the space."""
    folder: Path = tmp_path_factory.mktemp("flags")
    (folder / "small.yaml").write_text(CONFIG)
    (folder / "space.yaml").write_text(SPACE)
    return [
        f"--data={digits}",
        f"--config={folder / 'small.yaml'}",
        f"--space={folder / 'space.yaml'}",
    ]
