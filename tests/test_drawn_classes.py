"""Classes that nobody asked for are drawn as often as the training images have them."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
from helpers.run_folder import leave, trained_run

import cl_ray
from cl_ray.base_config import FORMAT_VERSION
from cl_ray.checkpoint import WEIGHTS
from cl_ray.cli import main
from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.errors import UserError
from cl_ray.model import BLOCK, TrainedModel, read_metadata

UNKNOWN = "does not say how many images each class has: all are drawn alike"


@pytest.fixture(scope="module")
def folder(make_digits: Callable[[int], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of digits without a 3, with half of the 1s, and with a name more than classes."""
    rows = Dataset.open(make_digits(300)).read("train")
    assert rows.label is not None
    ones = np.cumsum(rows.label == 1)
    keep = (rows.label != 3) & ((rows.label != 1) | (ones % 2 == 0))
    data = tmp_path_factory.mktemp("data") / "uneven"
    pictures = [
        RawImage(image, int(label), "digit")
        for image, label in zip(rows.image[keep], rows.label[keep], strict=True)
    ]
    names = [*"0123456789", "ten"]
    write_splits({"train": pictures}, str(data), DatasetMetadata("uneven", "MNIST", classes=names))
    run = trained_run(str(data), condition="projection")
    return leave(run, tmp_path_factory.mktemp("runs"), step=10)


@pytest.fixture(scope="module")
def run(folder: Path) -> TrainedModel:
    return cl_ray.load(folder)


@pytest.fixture
def older(folder: Path, tmp_path: Path) -> Path:
    """The same run as it was left before classes were counted."""
    new = tmp_path / "older"
    (new / "checkpoints/step-00000010").mkdir(parents=True)
    for file in ("config.yaml", *(f"checkpoints/step-00000010/{f}" for f in WEIGHTS.values())):
        (new / file).write_bytes((folder / file).read_bytes())
    files = {}
    for name in WEIGHTS.values():
        file = new / "checkpoints/step-00000010" / name
        blob = file.read_bytes()
        facts = {k: v for k, v in read_metadata(blob).items() if k != "counts"}
        weights = safetensors.torch.load(blob)
        blob = safetensors.torch.save(weights, metadata={"cl_ray": json.dumps(facts)})
        file.write_bytes(blob)
        files[name] = {"bytes": len(blob), "sha256": hashlib.sha256(blob).hexdigest()}
    manifest = {"format_version": FORMAT_VERSION, "epoch": 1, "step": 10, "metric": None}
    manifest["files"] = files
    (new / "checkpoints/step-00000010/manifest.json").write_text(json.dumps(manifest))
    return new


def drawn(run: TrainedModel, n: int, seed: int = 3, start: int = 0) -> np.ndarray:
    kinds = run.sample_labels(n, seed, start)
    assert kinds is not None
    return kinds


def test_classes_are_drawn_as_often_as_the_training_images_have_them(run: TrainedModel) -> None:
    labels = Dataset.open(run.config.data).read("train").label
    assert labels is not None
    counts = np.bincount(labels, minlength=11)
    assert run.counts == tuple(counts)
    assert counts[3] == counts[10] == 0
    for block in range(4):
        found = np.bincount(drawn(run, BLOCK, start=block * BLOCK), minlength=11)
        assert np.abs(found - BLOCK * counts / counts.sum()).max() < 1
        assert found[3] == found[10] == 0


def test_more_begin_with_the_same_and_each_is_decoded_as_its_class(run: TrainedModel) -> None:
    kinds = drawn(run, 3 * BLOCK)
    assert np.array_equal(
        drawn(run, BLOCK + 75, start=BLOCK - 23), kinds[BLOCK - 23 :][: BLOCK + 75]
    )
    assert not np.array_equal(drawn(run, 70, seed=4), kinds[:70])
    assert not np.array_equal(kinds[:BLOCK], kinds[BLOCK : 2 * BLOCK])
    assert len(np.unique(kinds[:40])) > 5  # mixed, not one class after another
    many = run.generate(BLOCK + 20, seed=3)
    decoded = run.decode(
        run.latents(BLOCK + 20, 3, labels=kinds[: BLOCK + 20]), labels=kinds[: BLOCK + 20]
    )
    assert np.abs(many.astype(int) - decoded).max() <= 1


def test_each_of_more_classes_than_a_block_has_images_is_drawn(run: TrainedModel) -> None:
    count = 2 * BLOCK
    thousand = replace(run, classes=tuple(map(str, range(count))), counts=(3,) * count)
    found = np.bincount(drawn(thousand, 40 * BLOCK), minlength=count)
    assert found.mean() == 20
    assert found.min() > 5
    assert found.max() < 40  # of each block a half, drawn anew: a standard deviation of 3.2
    rare = replace(run, counts=(10**6, *[1] * 10))
    assert np.bincount(drawn(rare, 20 * BLOCK), minlength=11)[1:].sum() <= 20


def test_a_class_without_training_images_is_refused(
    folder: Path, run: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = (
        r"class '?3'? had no training image, so G never learnt it; there were images of: 0, 1, 2,"
    )
    for label in (3, "3"):
        with pytest.raises(UserError, match=said + " 4, 5, 6, 7, 8, 9"):
            run.generate(2, label=label)
    with pytest.raises(UserError, match="class 'ten' had no training image"):
        run.class_index("ten")
    assert run.generate(2, label="4").shape == (2, 28, 28, 1)
    with pytest.raises(SystemExit) as end:
        main(["generate", str(folder), "--class=3", f"--out={tmp_path}/threes"])
    assert end.value.code == 1
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "class '3' had no training image" in message
    assert not (tmp_path / "threes").exists()


def test_the_command_draws_them_so(
    folder: Path, run: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "all.parquet"
    main(["generate", str(folder), "--count=500", "--seed=5", "--actors=1", f"--out={out}"])
    assert pq.read_table(out)["label"].to_pylist() == drawn(run, 500, seed=5).tolist()
    assert UNKNOWN not in " ".join(capsys.readouterr().out.split())


def test_an_older_checkpoint_draws_all_alike_often_and_says_so(
    older: Path, run: TrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = cl_ray.load(older)
    assert (old.counts, old.classes) == ((), run.classes)
    with pytest.warns(UserWarning, match=UNKNOWN):
        found = np.bincount(drawn(old, 11 * BLOCK), minlength=11)
    assert np.abs(found - BLOCK).max() <= 11
    assert old.generate(2, label=3).shape == (2, 28, 28, 1)
    out = tmp_path / "all.parquet"
    main(["generate", str(older), "--count=110", "--actors=1", f"--out={out}"])
    assert UNKNOWN in " ".join(capsys.readouterr().out.split())
    found = np.bincount(pq.read_table(out)["label"].to_numpy(), minlength=11)
    assert found.min() >= 1
