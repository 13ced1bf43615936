"""The log of a run is read back, complete or cut short."""

import json
import math
from pathlib import Path

import numpy as np
from helpers.reported_run import EPOCHS, RECORDS, run_storage
from torch.utils.tensorboard import SummaryWriter

from cl_ray.metrics_file import read_epochs
from cl_ray.report.records import read_curves, read_record


def test_curves_are_read_from_the_events_by_step(trained: Path) -> None:
    folder = run_storage(trained)
    found = read_curves(folder)
    assert {"d/adversarial", "g/adversarial", "score/real", "score/fake"} <= set(found)
    assert not [name for name in found if name.startswith("epoch/")]
    for name in ("d/adversarial", "speed/images_per_second"):
        assert found[name].steps.tolist() == list(range(2, 31, 2))
        assert len(found[name].values) == RECORDS
    # Five records of two steps each make an epoch, whose mean metrics.jsonl has.
    means = found["g/reconstruction"].values.reshape(EPOCHS, 5).mean(1)
    assert np.allclose(means, [line["g/reconstruction"] for line in read_epochs(folder)], rtol=1e-5)


def test_incomplete_records_are_left_out(copied: Path) -> None:
    folder = run_storage(copied)
    (copied / "summary.json").write_text(json.dumps({"epochs": 3})[:-1])
    assert read_record(folder, "summary.json") is None
    assert read_record(folder, "nowhere.json") is None
    assert folder.files("nowhere") == []


def test_nan_and_inf_are_left_out(tmp_path: Path) -> None:
    folder = run_storage(tmp_path)
    assert read_curves(folder) == {}
    with SummaryWriter(str(tmp_path / "tensorboard")) as events:
        for step, values in {5: (math.nan, 2.0), 10: (math.nan, math.inf)}.items():
            for name, value in zip("dg", values, strict=True):
                events.add_scalar(f"{name}/adversarial", value, step)
    found = read_curves(folder)
    assert set(found) == {"g/adversarial"}
    assert found["g/adversarial"].steps.tolist() == [5]
