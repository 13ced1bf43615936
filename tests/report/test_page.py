"""The page shows what the run has, and names what it has not; errors are one sentence."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow.fs
import pytest
from helpers.datasets import mnist, write_images
from helpers.refusal import refused
from helpers.reported_run import EVALUATION, run_storage, train, write_digits
from helpers.run_folder import build_trainer, save_run

from cl_ray import cli
from cl_ray.errors import UserError
from cl_ray.report.page import write_run_report


def text_of(path: Path | str) -> str:
    return Path(path).read_text()


def section(page: str, name: str) -> str:
    found = re.search(rf'<section id="{name}">(.*?)</section>', page, re.DOTALL)
    assert found, name
    text = re.sub(r"<script.*?</script>", "", found.group(1), flags=re.DOTALL)
    text = text.replace("<wbr>", "")  # where a word may be broken
    return " ".join(re.sub(r"<[^>]*>|&nbsp;", " ", text).split())


def sections(page: str) -> list[str]:
    return re.findall(r'<section id="(\w+)"', page)


EVERY = [
    "samples", "pairs", "interpolations", "neighbours", "metrics", "embeddings", "curves",
    "balance", "settings",
]  # fmt: skip


def test_a_finished_run_has_every_part(page: Path) -> None:
    text = text_of(page)
    assert sections(text) == EVERY
    assert 'class="missing"' not in text
    assert re.findall(r'href="#(\w+)"', text) == EVERY
    metrics = section(text, "metrics")
    assert "Measured at checkpoint step-00000030 on digits, in 80 s." in metrics
    assert "feature space of mnist-classifier, 10,000 samples" in metrics
    for words in (
        "Fréchet distance 0 for identical distributions 1.9 baseline 0.03; 63.3 × the baseline",
        "0.004 baseline 0.00001",
        "81.00% baseline 95.00%",
        "1 : 2.5 baseline 1 : 1.2",
        "Something new 0.123",
        "1-NN 97.67% 91.00%",
        "10 labels per class 88.00% ± 1.23 –",
        "Clustering accuracy 0.912 ± 0.0345 –",
        "Uniformity -2.35 –",
        "12.0 1",
        "trained without labels",
        "A note of &lt;the&gt; evaluation.",
    ):
        assert words in metrics, words
    settings = section(text, "settings")
    for words in (
        "generator.width 4 32", "seed 7 0", "latent: 10", "5:52 in all", "353,227 parameters",
        "1.23 GB at its peak", "cpu, 1 threads, float32", "torch 2.14.1",
    ):  # fmt: skip
        assert words in settings, words
    assert "storage /" not in settings  # where the run is stored is no changed setting
    assert "for 3 epochs, 30 steps of 32 pairs" in text
    assert "still training" not in text
    assert "0.0213" in section(text, "pairs")
    assert "all 300 training images" in section(text, "neighbours")
    assert "90 images of the split test" in section(text, "embeddings")


@pytest.fixture
def without_networks(copied: Path) -> Path:
    """A copy of the run without a checkpoint: without galleries its page is written at once."""
    shutil.rmtree(copied / "checkpoints")
    return copied


def test_a_run_that_is_still_training(without_networks: Path) -> None:
    folder = without_networks
    (folder / "summary.json").unlink()
    (folder / "evaluation.json").unlink()
    config = (folder / "config.yaml").read_text().replace("epochs: 3", "epochs: 5")
    (folder / "config.yaml").write_text(config)
    text = text_of(write_run_report(folder).location)
    assert sections(text) == EVERY
    assert "3 of 5 epochs" in text
    assert "still training, or was stopped" in text
    assert "the run writes summary.json at its end" in section(text, "settings")
    assert f"Not measured: cl-ray evaluate {folder}" in section(text, "metrics")


def test_a_run_that_has_nothing_yet(copied: Path) -> None:
    for name in ("checkpoints", "samples", "tensorboard"):
        shutil.rmtree(copied / name)
    for file in copied.iterdir():
        if file.name != "config.yaml":
            file.unlink()
    made = write_run_report(copied)
    assert made.missing == [f"{copied} has no checkpoint yet: train it further."]
    assert not made.projector
    text = text_of(made.location)
    assert sections(text) == EVERY
    for name in EVERY:
        assert len(re.findall(r"\w+", section(text, name))) > 5, name
    for name in ("samples", "interpolations", "neighbours", "embeddings"):
        assert "has no checkpoint yet" in section(text, name)
    assert "Nothing is logged yet" in section(text, "curves")
    assert "<img" not in text


def test_data_that_cannot_be_reached(copied: Path, tmp_path: Path) -> None:
    config = (copied / "config.yaml").read_text()
    gone = str(tmp_path / "gone")
    (copied / "config.yaml").write_text(re.sub(r"\ndata: .*", f"\ndata: {gone}", config))
    made = write_run_report(copied)
    assert len(made.missing) == 1
    assert gone in made.missing[0]
    text = text_of(made.location)
    for name in ("neighbours", "embeddings"):
        assert f"The data cannot be shown: {gone}" in section(text, name)
    assert "From noise to noise" in section(text, "interpolations")
    assert "From a real image" not in section(text, "interpolations")
    assert "at checkpoint step-00000030" in section(text, "samples")


def test_data_without_labels_and_test_images(tmp_path: Path) -> None:
    data = write_digits(tmp_path / "plain", labelled=False, test=False)
    folder = run_storage(tmp_path / "demo")
    train(folder, data, epochs=1)
    made = write_run_report(folder.uri)
    text = text_of(made.location)
    assert "300 images of the split train" in section(text, "embeddings")
    assert "have no labels, so the points have one colour" in section(text, "embeddings")
    assert "of a held-out real image" not in section(text, "neighbours")
    assert made.projector
    metadata = next((tmp_path / "demo" / "tensorboard").rglob("metadata.tsv")).read_text()
    assert metadata.splitlines()[0] == "id\tsplit"
    assert {line.split("\t")[1] for line in metadata.splitlines()[1:]} == {"train"}


@pytest.mark.parametrize(
    ("condition", "labels", "reason"),
    [
        ("none", [3], "One image is too few"),
        ("classifier", [None, 3], "One image is too few"),
        ("projection", [None, None], "D predicts no classes"),
    ],
)
def test_images_that_cannot_be_interpolated(
    condition: str, labels: list[int | None], reason: str, tmp_path: Path
) -> None:
    test = mnist("test", len(labels))[0], labels
    data = write_images(tmp_path / "digits", train=mnist("train", 64), test=test)
    run = save_run(build_trainer(data, condition=condition), tmp_path, 1)
    text = text_of(write_run_report(run).location)
    assert reason in section(text, "interpolations")
    assert "that of a held-out real image" in section(text, "neighbours")


def test_parts_of_an_evaluation(without_networks: Path) -> None:
    for left, complaint in (
        ({"fidelity": None}, "Not measured, as there is no reference"),
        ({"representation": None}, "which takes labels"),
        ({"representation": {"discriminator": {}}}, "which takes labels"),
        ({"representation": {"encoder": {"knn_1": {"value": 0.7531}}}}, "1-NN 75.31%"),
        ({"reconstruction": None, "seconds": None, "checkpoint": None, "notes": None}, None),
        ({"fidelity": {"features": "inception-v3", "metrics": {}, "histogram": None}}, "Not meas"),
    ):
        content = json.dumps(EVALUATION | left).encode()
        run_storage(without_networks).write("evaluation.json", content)
        text = text_of(write_run_report(without_networks).location)
        shown = section(text, "metrics")
        assert complaint in shown if complaint else "Not measured" not in shown
        assert sections(text) == EVERY
        assert "None" not in section(text, "metrics")


def test_the_split_of_evaluations_while_training_is_named(copied: Path) -> None:
    lines = [json.loads(line) for line in (copied / "metrics.jsonl").read_text().splitlines()]
    told = [json.dumps(ln | {"evaluation/knn_1": 0.9 + 0.01 * ln["epoch"]}) for ln in lines]
    (copied / "metrics.jsonl").write_text("\n".join(told) + "\n")
    metrics = section(text_of(write_run_report(copied, projector=False).location), "metrics")
    assert "Measured on training images, as the data has no split validation." in metrics
    assert "1-NN from 91.00% to 93.00%" in metrics  # the description of the chart


def test_a_config_that_cannot_be_read_leaves_the_rest(copied: Path) -> None:
    with (copied / "config.yaml").open("a") as config:
        config.write("from_tomorrow: 3\n")
    made = write_run_report(copied)
    assert any("from_tomorrow" in sentence for sentence in made.missing)
    text = text_of(made.location)
    assert "cannot be read by this version" in text
    assert "from_tomorrow" in section(text, "settings")
    assert "G’s loss against D’s" in section(text, "balance")


def test_a_page_on_remote_storage_equals_the_local_one(
    trained: Path, page: Path, bucket: Any
) -> None:
    uri = bucket.uri("reported")
    remote, path = pyarrow.fs.FileSystem.from_uri(uri)
    pyarrow.fs.copy_files(
        str(trained), f"{path}/demo", destination_filesystem=remote,
        source_filesystem=pyarrow.fs.LocalFileSystem(),
    )  # fmt: skip
    local = bucket.files("reported/demo/").pop("report.html").decode()
    remote.delete_file(f"{path}/demo/report.html")
    remote.delete_file(f"{path}/demo/tensorboard/projector_config.pbtxt")
    made = write_run_report(uri.replace("/reported?", "/reported/demo?"))
    assert made.location == "s3://bucket/reported/demo/report.html"
    files = bucket.files("reported/demo/")
    assert "tensorboard/projector_config.pbtxt" in files
    assert len(files["report.html"]) == made.bytes
    text = files["report.html"].decode()
    for name in EVERY[:-1]:
        ours, theirs = (
            section(t, name).replace(place, "HERE")
            for t, place in ((text, "s3://bucket/reported/demo"), (local, str(trained)))
        )
        assert ours == theirs, name


def test_the_command(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(copied.parent)
    (copied / "tensorboard" / "projector_config.pbtxt").unlink(missing_ok=True)
    evaluation = json.dumps(EVALUATION | {"checkpoint": "step-00000020"})
    (copied / "evaluation.json").write_text(evaluation)
    cli.main(["report", "demo", "--checkpoint=best", "--no-projector"])
    shown = capsys.readouterr().out
    assert f"{copied}/report.html (" in shown
    assert "kB)" in shown
    assert "rojector" not in shown
    metrics = section(text_of(copied / "report.html"), "metrics")
    assert "The images on this page are of step-00000030" in metrics
    assert not (copied / "tensorboard" / "projector_config.pbtxt").exists()
    for manifest in (copied / "checkpoints").glob("*/manifest.json"):
        manifest.unlink()
    cli.main(["report", f"{copied}/"])
    assert "has no checkpoint yet" in capsys.readouterr().out


def test_a_missing_run_or_checkpoint_is_one_sentence(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copied / "report.html").unlink(missing_ok=True)
    for flags, complaint in (
        ([str(tmp_path / "nowhere")], "nowhere is not a run folder: it does not exist"),
        ([str(copied), "--checkpoint=step-00000099"], "There is no checkpoint step-00000099"),
    ):
        assert complaint in refused(capsys, "report", *flags)
    with pytest.raises(SystemExit):
        cli.main(["report", str(copied), "--device=gpu"])
    assert "gpu" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()
    assert not (copied / "report.html").exists()


def test_a_page_that_cannot_be_written(without_networks: Path) -> None:
    (without_networks / "report.html").unlink(missing_ok=True)
    (without_networks / "report.html").mkdir()
    with pytest.raises(UserError, match=r"report.html cannot be written \([\d,]+ bytes\)"):
        write_run_report(without_networks)
