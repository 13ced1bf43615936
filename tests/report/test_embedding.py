"""The map of D's embeddings, and the files of TensorBoard's projector."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format
from helpers.reported_run import TEST, run_storage
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

import cl_ray
from cl_ray.data.dataset import UNLABELLED, Dataset, RowBatch
from cl_ray.errors import UserError
from cl_ray.report import embedding
from cl_ray.report.embedding import embedding_map, plot_embedding, write_projector


def test_a_map_keeps_clusters_together() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 100)) * 10
    label = np.repeat([0, 1, 2], 30)
    features = (centres[label] + random.normal(size=(90, 100))).astype(np.float32)
    points, components, variance = embedding_map(features)
    assert points.shape == (90, 2)
    assert components.shape == (90, 50)
    assert 0.9 < variance < 1
    away = np.linalg.norm(points[:, None] - points, axis=2) + np.eye(90) * 1e9
    assert (label[away.argmin(1)] == label).all()
    assert np.array_equal(embedding_map(features)[0], points)
    assert embedding_map(features[:10])[0].shape == (10, 2)  # the fewest that there may be


def test_equal_embeddings_make_no_map(trained: Path, digits: str) -> None:
    dataset = Dataset.open(digits)
    rows = dataset.read("test")
    same = rows.take(np.zeros(40, np.int64))
    with pytest.raises(UserError, match="All 40 embeddings are the same"):
        plot_embedding(cl_ray.load(trained), dataset, same, "test")
    with pytest.raises(UserError, match="9 images are too few"):
        plot_embedding(cl_ray.load(trained), dataset, rows.take(slice(0, 9)), "test")


def test_every_image_is_a_point_and_names_do_not_overlap(trained: Path, digits: str) -> None:
    dataset = Dataset.open(digits)
    test = dataset.read("test")
    plot = plot_embedding(cl_ray.load(trained), dataset, test, "test")
    traces = plot.chart.figure.data
    assert [trace.name for trace in traces] == [str(digit) for digit in range(10)]
    drawn = {point for trace in traces for point in zip(trace.x, trace.y, strict=True)}
    points = embedding_map(cl_ray.load(trained).embed(test.image))[0]
    assert drawn == set(map(tuple, points))
    assert len({trace.marker.color for trace in traces}) == 10

    points = np.array([[0, 0], [1, 1], [1.01, 1.01], [3, 3]], float)
    origins = np.array(["<1>.png", "2.png", "3.png", "4.png"], object)
    rows = RowBatch(np.arange(4), test.image[:4], np.arange(4), origins)
    chart = embedding._map_chart(points, list("abcd"), rows)
    assert [note.text for note in chart.figure.layout.annotations] == ["a", "d"]
    hover = [trace.hovertext for trace in chart.figure.data]
    assert hover == [("a &lt;1&gt;.png",), ("b 2.png",), ("c 3.png",), ("d 4.png",)]


def test_names_of_classes_are_text_and_images_without_a_label_are_named_so(
    trained: Path, digits: str
) -> None:
    dataset = Dataset.open(digits)
    hostile = ["<b>\ta%{x}\n\u202e", *map(str, range(1, 10))]
    named = replace(dataset, info=dataset.info.model_copy(update={"classes": hostile}))
    test = dataset.read("test")
    assert test.label is not None
    some = replace(test, label=np.where(test.label < 5, test.label, UNLABELLED))
    plot = plot_embedding(cl_ray.load(trained), named, some, "test")
    assert plot.names is not None
    assert "<b>\\ta%{x}\\n\\u202e" in plot.names  # a cell of the projector's table
    traces = plot.chart.figure.data
    escaped = "&lt;b&gt;\\ta%{x}\\n\\u202e"
    assert [trace.name for trace in traces] == ["no label", escaped, "1", "2", "3", "4"]
    assert traces[1].hovertext == escaped
    assert traces[1].hovertemplate is None
    assert plot.chart.alt.endswith("in 5 labels.")


def test_the_projector_has_every_image_with_its_label(
    trained: Path, page: Path, digits: str
) -> None:
    logs = trained / "tensorboard"
    index = text_format.Parse((logs / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (entry,) = index.embeddings
    assert entry.tensor_name == "discriminator:00030"
    table = np.loadtxt(logs / entry.tensor_path, delimiter="\t", ndmin=2)
    assert table.shape == (TEST, 50)
    header, *rows = (logs / entry.metadata_path).read_text().splitlines()
    assert header == "id\tlabel"
    truth = Dataset.open(digits).read("test")
    assert truth.label is not None
    labels = dict(zip(truth.id.tolist(), truth.label.tolist(), strict=True))
    written = [(int(number), int(label)) for number, label in (r.split("\t") for r in rows)]
    assert dict(written) == labels
    # The components are a rotation of the features: distances between images are kept.
    order = [int(np.flatnonzero(truth.id == number)[0]) for number, _ in written]
    features = cl_ray.load(trained).embed(truth.image[order]).astype(float)
    away = [np.linalg.norm(t[:, None] - t, axis=2) for t in (table, features)]
    assert np.corrcoef(away[0].ravel(), away[1].ravel())[0, 1] > 0.99
    sprite = np.asarray(Image.open(logs / entry.sprite.image_path))
    assert list(entry.sprite.single_image_dim) == [28, 28]
    assert sprite.shape == (280, 280, 3)  # 10 x 10 for 90
    row, column = divmod(17, 10)
    tile = sprite[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28, :1]
    assert np.abs(tile.astype(int) - truth.image[order[17]]).max() <= 1
    assert len(list(logs.glob("events*"))) == 1  # the training's own


def test_embeddings_of_other_steps_are_kept(page: Path, copied: Path, digits: str) -> None:
    """Those of the same step are replaced. The page has written the last step's."""
    logs, dataset = copied / "tensorboard", Dataset.open(digits)
    run = cl_ray.load(copied, "step-00000020")
    plot = plot_embedding(run, dataset, dataset.read("test"), "test")
    for _ in range(2):
        write_projector(run_storage(copied), run.step, plot)
    text = (logs / "projector_config.pbtxt").read_text()
    index = text_format.Parse(text, ProjectorConfig())
    names = [entry.tensor_name for entry in index.embeddings]
    assert names == ["discriminator:00020", "discriminator:00030"]
    for entry in index.embeddings:
        assert (logs / entry.tensor_path).is_file()
    assert len(list(logs.glob("*tfevents*"))) == 1


def test_points_of_large_images_are_small(page: Path, copied: Path, digits: str) -> None:
    """TensorBoard holds several copies of all in float64."""
    logs, dataset = copied / "tensorboard", Dataset.open(digits)
    plot = plot_embedding(cl_ray.load(copied), dataset, dataset.read("test"), "test")
    image = plot.rows.image.repeat(7, 1).repeat(7, 2)
    write_projector(run_storage(copied), 99, replace(plot, rows=replace(plot.rows, image=image)))
    text = (logs / "projector_config.pbtxt").read_text()
    entry = text_format.Parse(text, ProjectorConfig()).embeddings[0]
    assert list(entry.sprite.single_image_dim) == [49, 49]
    assert Image.open(logs / entry.sprite.image_path).size == (490, 490)
