"""Modes of stacked digits: from the data, through training and evaluation, to the report."""

import json
from pathlib import Path
from typing import Any

import pytest
from helpers.commands import read_metrics, train_here

from cl_ray.cli import main
from cl_ray.report.curves import evaluation_charts


@pytest.mark.slow
@pytest.mark.ray
def test_modes_from_the_data_to_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    data, folder = tmp_path / "triples", tmp_path / "demo"
    main(["data", "--source=stacked-mnist", f"--out={data}", "--count=320", "--test-count=90"])
    printed = train_here(folder, str(data), "--epochs=2", "--evaluation.samples=300")
    assert "of 1000 modes in 300 samples" in printed
    lines = read_metrics(folder)
    for line in lines:
        assert 1 <= line["evaluation/modes"] <= 300
        assert 1 < line["evaluation/mode_kl"] < 7.5  # 300 samples cannot have 1000 modes
        assert "evaluation/linear_probe" not in line
    titles = [chart.title for chart in evaluation_charts(lines)]
    assert {"Modes with a sample", "Accuracy of D’s representation"} <= set(titles)

    capsys.readouterr()
    main(["evaluate", str(folder)])
    shown = capsys.readouterr().out
    saved = json.loads((folder / "evaluation.json").read_text())
    assert saved["modes"]["count"] == 26_000
    found: dict[str, Any] = saved["modes"]["metrics"]
    rows = [line.split("│")[1:4] for line in shown.splitlines() if line.startswith("│")]
    table = {name.strip(): (value.strip(), floor.strip()) for name, value, floor in rows}
    assert table["modes with a sample"] == (f"{found['modes']['value']:.0f}", "1000")
    divergence = table["KL(samples || data) over modes, nats"]
    assert divergence == tuple(
        f"{found['mode_kl'][which]:.4f}" for which in ("value", "real_baseline")
    )
    assert "samples of each label" not in shown  # a thousand numbers
    assert "Not measured of this data of more than 200 classes: linear probe, 10 labels" in shown
    assert "accuracy of a classifier trained on them." in shown

    main(["report", str(folder), "--no-projector"])
    page = (folder / "report.html").read_text()
    assert "Of 1,000 modes, in 26,000 samples" in page
    row = page.split("<b>Modes with a sample</b>")[1].split("</p>")[1]
    assert f"<b>{found['modes']['value']:,.0f}</b> <small>baseline 1,000</small>" in row
