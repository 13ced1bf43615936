"""The page of a run that was trained with labels says which picture is of which class."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.reported_run import write_digits
from helpers.run_folder import leave, trained_run

import cl_ray
from cl_ray.report.balance import curve_charts, evaluation_charts
from cl_ray.report.galleries import CLASSES, by_class, some_classes
from cl_ray.report.page import write_run_report
from cl_ray.report.records import MetricCurve
from cl_ray.storage import RunStorage
from cl_ray.training.run_logger import RunLogger


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = write_digits(tmp_path_factory.mktemp("digits") / "digits")
    run = trained_run(data, condition="classifier")
    folder = leave(run, tmp_path_factory.mktemp("runs"), 10)
    journal = RunLogger(RunStorage.of(folder), run)
    journal.epoch({"g/reconstruction": 0.1, "seconds": 1.0, "images_per_second": 300.0})
    journal.close()
    return folder


def test_each_class_has_a_row_that_is_named(folder: Path) -> None:
    rows = by_class(cl_ray.load(folder))
    assert [row.label for row in rows] == list("0123456789")
    assert len({row.source for row in rows}) == 10
    page = Path(write_run_report(folder).location).read_text()
    part = page.partition("<h3>By class</h3>")[2].partition("<h3>")[0]
    assert re.findall(r"<span>(\w+)</span>", part) == list("0123456789")
    assert "A column is the same noise, and the same class, all along" in page
    assert "Between two noises a row is of one class" in page


def test_without_classes_nothing_is_said_of_them(folder: Path, tmp_path: Path) -> None:
    config = cl_ray.load(folder).config
    page = Path(
        write_run_report(leave(trained_run(config.data), tmp_path, 10)).location
    ).read_text()
    assert "By class" not in page
    assert "is of one class" not in page


def test_of_many_classes_some_with_images_are_shown(folder: Path) -> None:
    run = cl_ray.load(folder)
    many = replace(run, classes=tuple(map(str, range(100))), counts=(0, 3) * 50)
    shown = some_classes(many, CLASSES)
    assert len(set(shown)) == CLASSES
    assert all(kind % 2 for kind in shown)
    assert shown[-1] > 90
    assert some_classes(replace(run, counts=()), CLASSES) == list(range(10))


def test_how_well_classes_are_met_has_its_charts() -> None:
    lines = [{"step": s, "evaluation/class_accuracy": s / 20} for s in (5, 10)]
    (chart,) = evaluation_charts(lines)
    assert chart.title == "Samples of the class asked for"
    assert chart.lines[0].values == ["25.00%", "50.00%"]
    curve = MetricCurve(np.arange(3), np.ones(3))
    (chart,) = curve_charts({"d/classification": curve, "g/classification": curve}, [])
    assert chart.title == "Naming the class: losses"
