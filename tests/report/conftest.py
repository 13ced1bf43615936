import json
import shutil
from pathlib import Path

import pytest
from helpers.reported_run import EVALUATION, SUMMARY, train, write_digits

from cl_ray.report.page import write_run_report
from cl_ray.storage import RunStorage


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A data set of packaged digits, training and test."""
    return write_digits(tmp_path_factory.mktemp("digits") / "digits")


@pytest.fixture(scope="session")
def trained(digits: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished and evaluated run; tests leave it as it is."""
    folder = RunStorage.at(str(tmp_path_factory.mktemp("runs")), "demo")
    train(folder, digits)
    folder.write("summary.json", json.dumps(SUMMARY).encode())
    folder.write("evaluation.json", json.dumps(EVALUATION).encode())
    return Path(folder.uri)


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy of that run, to do as one likes with."""
    return Path(shutil.copytree(trained, tmp_path / "demo"))


@pytest.fixture(scope="session")
def page(trained: Path) -> Path:
    made = write_run_report(trained)
    assert made.missing == []
    assert made.projector
    return Path(made.location)
