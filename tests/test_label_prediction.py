"""Predicted labels: those of label spreading, whatever the number of images and of blocks."""

from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import labels_of, mnist, write_images
from helpers.refusal import error_of
from helpers.run_folder import save_run, trained_run

from cl_ray import label_prediction
from cl_ray.commands import label as label_command
from cl_ray.data.dataset import UNLABELLED, Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.errors import UserError
from cl_ray.evaluation import probes
from cl_ray.label_prediction import predict_labels


def pixels(images: np.ndarray) -> np.ndarray:
    return (images.reshape(len(images), -1) / 255).astype(np.float32)


@pytest.fixture(scope="module")
def partly(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, np.ndarray, np.ndarray]:
    """540 digits, some labelled, ids with gaps; labels in the order of the rows, and true ones."""
    images, true = mnist("train", 600)
    path = str(tmp_path_factory.mktemp("data") / "partly")
    raw = [
        RawImage(image, int(label) if row < 60 else None, "digit", origin=f"{row}.png")
        for row, (image, label) in enumerate(zip(images, true, strict=True))
    ]
    classes = [f"digit {n}" for n in range(10)]
    metadata = DatasetMetadata("partly", "a test", classes=classes)
    write_splits({"train": raw}, path, metadata, validation_fraction=0.1)
    dataset = Dataset.open(path)
    rows = dataset.read("train")
    return dataset, labels_of(rows), true[rows.id]


def test_all_images_get_the_labels_of_label_spreading(
    partly: tuple[Dataset, np.ndarray, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset, given, true = partly
    x = pixels(dataset.read("train").image)
    known = np.flatnonzero(given != UNLABELLED)
    done: list[int] = []
    found = predict_labels(pixels, dataset, given, lambda stage, n, of: done.append(n))
    assert np.array_equal(found.label[known], given[known])
    assert (found.confidence[known] == 1).all()
    assert done == [540]
    rows = probes.graph_rows(known, 540)
    graph = probes.NeighbourGraph(probes.principal_components(x[rows], x[rows])[0])
    others = rows[len(known) :]
    parts = graph.spread(np.arange(len(known)), given[known], 10)[len(known) :]
    assert np.array_equal(found.label[others], parts.argmax(1))
    assert np.allclose(found.confidence[others], parts.max(1))
    right = (found.label == true)[others]  # of pixels, and a tenth by chance
    assert right.mean() > 0.25
    assert right[found.confidence[others] > 0.3].mean() > 0.9

    monkeypatch.setattr(label_prediction, "_BLOCK_BYTES", 28 * 28 * 100)
    in_blocks = predict_labels(pixels, dataset, given, lambda *_: None)
    assert np.array_equal(in_blocks.label, found.label)

    monkeypatch.setattr(probes, "_GRAPH", 300)  # half of the images are not in it
    outside = predict_labels(pixels, dataset, given, lambda *_: None)
    assert np.array_equal(outside.label[known], given[known])
    assert (outside.label == true).mean() > 0.25

    monkeypatch.setattr(label_prediction, "_LABELLED", 20)  # of each class two
    fewer = predict_labels(pixels, dataset, given, lambda *_: None)
    assert np.array_equal(fewer.label[known], given[known])
    assert not np.array_equal(fewer.label, outside.label)

    with pytest.raises(UserError, match="NaN"):
        predict_labels(lambda x: np.full_like(pixels(x), np.nan), dataset, given, lambda *_: None)


def test_images_that_no_label_reaches_keep_none(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    images = random.integers(0, 30, (40, 28, 28, 1), np.uint8)
    images[20:] += 200  # two clusters, a label in one of them
    path = write_images(tmp_path / "data", train=(images, [0, 1, *[None] * 38]))
    dataset = Dataset.open(path)
    rows = dataset.read("train")
    found = predict_labels(pixels, dataset, labels_of(rows), lambda *_: None)
    assert ((found.label == UNLABELLED) == (rows.id >= 20)).all()
    assert (found.confidence[rows.id >= 20] == 0).all()


def test_the_command_writes_the_dataset_with_predicted_labels(
    partly: tuple[Dataset, np.ndarray, np.ndarray],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    dataset, given, _ = partly
    run = str(save_run(trained_run(dataset.location, batch_size=32), tmp_path, 1))
    out = str(tmp_path / "all")
    label_command.command([run, "--out", out])
    written = Dataset.open(out)
    told = capsys.readouterr().out
    assert "embedding: 540 images" in told
    used = int((given != UNLABELLED).sum())
    assert written.info.predicted_labels == f"{used} labels, the others predicted over {run}"
    assert written.info.predicted_labels in " ".join(told.split())
    assert written.class_names() == dataset.class_names()
    for split in ("train", "validation"):
        before, after = (d.read(split, origins=True).sorted_by_id() for d in (dataset, written))
        assert np.array_equal(before.id, after.id)
        assert np.array_equal(before.image, after.image)
        assert before.origin is not None
        assert after.origin is not None
        assert before.origin.tolist() == after.origin.tolist()
        known = labels_of(before) != UNLABELLED
        assert np.array_equal(labels_of(after)[known], labels_of(before)[known])
        assert (labels_of(after)[~known] != UNLABELLED).all() == (split == "train")

    label_command.command([run, "--out", out, "--overwrite", "--count", "20"])
    assert f"of {used - 20} predicted labels differ from the hidden ones" in capsys.readouterr().out
    label_command.command([run, "--out", out, "--overwrite", "--count=20", "--confidence=1"])
    assert Dataset.open(out).info.labelled_rows("train") == 20


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "exists already"),
        (["--overwrite", "--data=mnist"], "All 55,000 training images of mnist have a label"),
        (["--overwrite", "--count=61"], "count 61 is more than the"),
        (["--overwrite", "--out=SOURCE"], "is the dataset itself: give another folder"),
        (["--overwrite", "--count=9"], "count 9 is less than one for each of the 10 classes"),
    ],
)
def test_mistakes_are_named_before_anything_is_computed(
    partly: tuple[Dataset, np.ndarray, np.ndarray], tmp_path: Path, flags: list[str], message: str
) -> None:
    run = str(save_run(trained_run(partly[0].location, batch_size=32), tmp_path, 1))
    out = write_images(tmp_path / "out", train=mnist("train", 20))
    given = [flag.replace("SOURCE", f"{partly[0].location}/") for flag in flags]
    assert message in error_of(lambda: label_command.command([run, "--out", out, *given]))
