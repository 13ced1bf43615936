"""The log of a run is read back, complete or cut short."""

import json
import shutil
from pathlib import Path

import numpy as np
from helpers.reported_run import EPOCHS, RECORDS, run_storage

from cl_ray.metrics_file import read_epochs
from cl_ray.report.records import read_curves, read_record


def test_curves_are_read_from_the_events_by_step(trained: Path) -> None:
    folder = run_storage(trained)
    found = read_curves(folder, read_epochs(folder))
    assert {"d/adversarial", "g/adversarial", "score/real", "score/fake"} <= set(found)
    assert not [name for name in found if name.startswith("epoch/")]
    for name in ("d/adversarial", "speed/images_per_second"):
        assert found[name].steps.tolist() == list(range(2, 31, 2))
        assert len(found[name].values) == RECORDS
    # Five records of two steps each make an epoch, whose mean metrics.jsonl has.
    means = found["g/reconstruction"].values.reshape(EPOCHS, 5).mean(1)
    assert np.allclose(means, [line["g/reconstruction"] for line in read_epochs(folder)], rtol=1e-5)


def test_without_events_there_is_a_point_an_epoch(copied: Path) -> None:
    shutil.rmtree(copied / "tensorboard")
    folder = run_storage(copied)
    lines = read_epochs(folder)
    found = read_curves(folder, lines)
    assert found["g/adversarial"].steps.tolist() == [10, 20, 30]
    assert found["g/adversarial"].values.tolist() == [line["g/adversarial"] for line in lines]
    assert found["speed/images_per_second"].steps.tolist() == [10, 20, 30]
    (copied / "metrics.jsonl").unlink()
    assert read_curves(folder, read_epochs(folder)) == {}


def test_incomplete_records_are_left_out(copied: Path) -> None:
    folder = run_storage(copied)
    (copied / "summary.json").write_text(json.dumps({"epochs": 3})[:-1])
    assert read_record(folder, "summary.json") is None
    assert read_record(folder, "nowhere.json") is None
    assert folder.files("nowhere") == []


def test_nan_and_inf_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        '{"epoch": 1, "step": 5, "d/adversarial": NaN, "g/adversarial": 2.0}\n'
        '{"epoch": 2, "step": 10, "d/adversarial": NaN, "g/adversarial": Infinity}\n'
    )
    folder = run_storage(tmp_path)
    found = read_curves(folder, read_epochs(folder))
    assert set(found) == {"g/adversarial"}
    assert found["g/adversarial"].steps.tolist() == [5]
