"""Rows [a, b) of a task, computed alone, equal the same rows of the whole result."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from helpers.datasets import mnist, write_images

import cl_ray
from cl_ray.data.dataset import Dataset, RowBatch
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.inference import tasks
from cl_ray.inference.actor_pool import weights_digest
from cl_ray.inference.tasks import (
    MAX_PART_BYTES,
    EmbedTask,
    GenerateTask,
    InferenceTask,
    ScoreTask,
    VariantsTask,
    read_rows,
)
from cl_ray.model import TrainedModel


@pytest.fixture(scope="module")
def model(trained: Path) -> TrainedModel:
    return cl_ray.load(trained)


@pytest.fixture(scope="module")
def dataset(some_digits: str) -> Dataset:
    return Dataset.open(some_digits)


def images_of(table: pa.Table) -> np.ndarray:
    return table["image"].combine_chunks().to_numpy_ndarray().astype(int)


def assert_equal(table: pa.Table, expected: pa.Table) -> None:
    """Check equality up to the rounding that depends on the size of the networks' batch."""
    assert table.column_names == expected.column_names
    for name in expected.column_names:
        if name == "image":
            assert np.abs(images_of(table) - images_of(expected)).max() <= 1
        elif name == "embedding":
            a, b = (t[name].combine_chunks().flatten() for t in (table, expected))
            assert np.allclose(a, b, atol=1e-4)
        elif name in ("novelty", "distance"):
            assert np.allclose(table[name], expected[name], rtol=1e-3, atol=5e-3)
        else:
            assert table[name].combine_chunks().equals(expected[name].combine_chunks())


@pytest.mark.parametrize("kind", ["generate", "embed", "variants", "score"])
def test_parts_concatenate_to_the_whole(model: TrainedModel, dataset: Dataset, kind: str) -> None:
    task: InferenceTask = {
        "generate": GenerateTask(1100, seed=3),
        "embed": EmbedTask(dataset, "train"),
        "variants": VariantsTask(dataset, "train", copies=2, distance=0.7, seed=1),
        "score": ScoreTask(dataset, "train", dataset),
    }[kind]
    whole = task.compute(model, 0, task.num_rows)
    assert len(whole) == task.num_rows
    edges = [*range(0, task.num_rows, 1001), task.num_rows]
    parts = [task.compute(model, *edge) for edge in pairwise(edges)]
    assert_equal(pa.concat_tables(parts), whole)
    if kind in ("embed", "score"):
        assert task.compute(model, 5, 5).equals(whole.slice(0, 0))


def test_embeddings_are_float32_lists_beside_id_and_label(
    model: TrainedModel, dataset: Dataset
) -> None:
    rows = dataset.read("train")
    table = EmbedTask(dataset, "train").compute(model, 0, 2040)
    assert table.column_names == ["id", "label", "embedding"]
    kind = table.schema.field("embedding").type
    assert pa.types.is_fixed_size_list(kind)
    assert kind.value_type == pa.float32()
    assert table["id"].to_pylist() == rows.id.tolist()
    assert rows.label is not None
    assert table["label"].to_pylist() == rows.label.tolist()
    embeddings = table["embedding"].combine_chunks().flatten().to_numpy().reshape(2040, -1)
    assert np.allclose(embeddings, model.embed(rows.image), atol=1e-5)


def test_scores_are_compared_with_known_images(
    model: TrainedModel, dataset: Dataset, make_digits: Any
) -> None:
    few = Dataset.open(make_digits(64))
    task, other = ScoreTask(dataset, "train", dataset), ScoreTask(dataset, "train", few)
    assert task.compute(model, 0, 50).column_names == ["id", "label", "novelty", "distance"]
    assert task.note(model).endswith("with themselves, too: they seem less novel.")
    assert "compared with 51 of 64 training images" in other.note(model)
    assert "themselves" not in other.note(model)
    assert json.dumps(task.describe()) != json.dumps(other.describe())


@pytest.mark.parametrize("kind", ["embed", "score"])
def test_the_images_of_a_part_are_read_piece_by_piece(
    model: TrainedModel, dataset: Dataset, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = dataset, "train"
    task = EmbedTask(*arguments) if kind == "embed" else ScoreTask(*arguments, dataset)
    whole = task.compute(model, 0, 300)
    sizes: list[int] = []

    def record(*arguments: Any) -> RowBatch:
        rows = read_rows(*arguments)
        sizes.append(len(rows.image))
        return rows

    monkeypatch.setattr(tasks, "read_rows", record)
    monkeypatch.setattr(tasks, "MAX_PART_BYTES", 100 * 28 * 28)
    assert_equal(task.compute(model, 0, 250), whole.slice(0, 250))
    assert sizes == [100, 100, 50]


def test_rows_without_a_label_have_null(model: TrainedModel, tmp_path: Path) -> None:
    images, labels = mnist("train", 30)
    some = [None if k % 2 else label for k, label in enumerate(labels)]
    dataset = Dataset.open(write_images(tmp_path / "some", train=(images, some)))
    ids = dataset.read("train").id.tolist()
    for task in (EmbedTask(dataset, "train"), VariantsTask(dataset, "train", 1, 0.0, 0)):
        task.check(model)
        assert task.compute(model, 0, 30)["label"].to_pylist() == [some[k] for k in ids]


def test_distance_moves_variants_away_from_the_reconstruction(
    model: TrainedModel, dataset: Dataset
) -> None:
    rows = dataset.read("train")
    assert rows.label is not None
    task = VariantsTask(dataset, "train", copies=3, distance=0.0, seed=0)
    table = task.compute(model, 4, 64)
    source = np.array(table["source"])
    assert source.tolist() == rows.id.repeat(3)[4:64].tolist()
    assert table["label"].to_pylist() == rows.label.repeat(3)[4:64].tolist()
    assert table["id"].to_pylist() == (source * 3 + np.arange(4, 64) % 3).tolist()
    reconstruction = model.reconstruct(rows.image[:22]).repeat(3, 0)[4:64].astype(int)
    assert np.abs(images_of(table) - reconstruction).max() <= 1

    near, far, other_seed = (
        images_of(replace(task, distance=distance, seed=seed).compute(model, 4, 64))
        for distance, seed in ((0.1, 0), (1.0, 0), (1.0, 1))
    )
    assert 0 < np.abs(near - reconstruction).mean() < np.abs(far - reconstruction).mean()
    assert not np.array_equal(far, other_seed)
    assert not np.array_equal(far[2], far[3])  # two variants of one image


def test_rows_say_where_their_images_are_from(model: TrainedModel, tmp_path: Path) -> None:
    images, _ = mnist("train", 20)
    raw = [RawImage(x, None, "digit", origin=f"{n}.png") for n, x in enumerate(images)]
    out = str(tmp_path / "named")
    write_splits({"train": raw}, out, DatasetMetadata("named", "a test"))
    dataset = Dataset.open(out)
    table = EmbedTask(dataset, "train").compute(model, 5, 9)
    assert table.column_names == ["id", "origin", "embedding"]
    assert table["origin"].to_pylist() == [f"{n}.png" for n in table["id"].to_pylist()]
    table = VariantsTask(dataset, "train", copies=2, distance=0.1, seed=0).compute(model, 5, 9)
    assert table["origin"].to_pylist() == [f"{n}.png" for n in table["source"].to_pylist()]


def test_read_rows_across_groups_and_shards() -> None:
    dataset = Dataset.open("mnist")  # four files, row groups of 1,024
    assert len(dataset.info.splits["train"].shards) == 4
    whole = dataset.read("train")
    edge = dataset.info.splits["train"].shards[0].rows
    for start, stop in ((0, 1), (1000, 3000), (edge - 5, edge + 5)):
        rows = read_rows(dataset, "train", start, stop)
        assert np.array_equal(rows.id, whole.id[start:stop])
        assert np.array_equal(rows.image, whole.image[start:stop])
    assert len(read_rows(dataset, "train", 54_990, 55_000).id) == 10


def test_part_size_is_bounded_and_aligned(model: TrainedModel, dataset: Dataset) -> None:
    sizes = [GenerateTask(n, 0).part_size(model) for n in (10, 100_000, 10**7, 10**9)]
    assert sizes == [4096, 4096, 10_000, MAX_PART_BYTES // 784]
    assert EmbedTask(dataset, "train").part_size(model) == 4 * 1024  # whole row groups
    many = VariantsTask(dataset, "train", copies=10**6, distance=1.0, seed=0)
    assert many.part_size(model) == MAX_PART_BYTES // 784  # not even one image's variants fit


def test_requests_differ_by_data_and_prior(
    model: TrainedModel, dataset: Dataset, make_digits: object
) -> None:
    other = Dataset.open(make_digits(64))  # type: ignore[operator]
    first, second = (EmbedTask(data, "train").describe() for data in (dataset, other))
    assert first["data digest"] != second["data digest"]
    assert model.prior is not None
    moved = model.prior._replace(codes=model.prior.codes + 1)
    assert weights_digest(model) == weights_digest(replace(model))
    for prior in (None, moved):
        assert weights_digest(model) != weights_digest(replace(model, prior=prior))
