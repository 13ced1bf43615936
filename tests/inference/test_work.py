"""Any stretch of the results, however they are cut, is what the whole is there."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import cl_ray
from cl_ray.data.dataset import Dataset
from cl_ray.inference.pool import digest
from cl_ray.inference.work import PART_BYTES, Around, Embed, FromNoise, Work, part_size, read
from cl_ray.model import TrainedModel


@pytest.fixture(scope="module")
def run(trained: Path) -> TrainedModel:
    return cl_ray.load(trained)


def near(ours: pa.Table, theirs: pa.Table) -> bool:
    """Equal, but for how many images the networks had at once."""
    for name in theirs.column_names:
        a, b = (t[name].combine_chunks() for t in (ours, theirs))
        if name == "image":
            a, b = a.to_numpy_ndarray().astype(int), b.to_numpy_ndarray().astype(int)
            same = np.abs(a - b).max() <= 1
        elif name == "embedding":
            same = np.allclose(a.flatten(), b.flatten(), atol=1e-4)
        else:
            same = a.equals(b)
        if not same:
            return False
    return ours.column_names == theirs.column_names


def test_parts_make_the_whole(run: TrainedModel, some_digits: str) -> None:
    dataset = Dataset.open(some_digits)
    works: list[Work] = [
        FromNoise(1100, seed=3),
        Embed(dataset, "train"),
        Around(dataset, "train", copies=2, distance=0.7, seed=1),
    ]
    for work in works:
        whole = work.make(run, 0, work.total)
        assert len(whole) == work.total
        for size in (700, 1001):
            parts = [
                work.make(run, start, min(start + size, work.total))
                for start in range(0, work.total, size)
            ]
            assert near(pa.concat_tables(parts), whole)


def test_images_of_noise_are_the_seed_s(run: TrainedModel) -> None:
    made = FromNoise(40, seed=3).make(run, 30, 40)
    assert made["id"].to_pylist() == list(range(30, 40))
    images = made["image"].combine_chunks().to_numpy_ndarray()
    assert np.abs(images.astype(int) - run.generate(40, seed=3)[30:]).max() <= 1


def test_embeddings_are_d_s_features_beside_id_and_label(
    run: TrainedModel, some_digits: str
) -> None:
    dataset = Dataset.open(some_digits)
    rows = dataset.read("train")
    made = Embed(dataset, "train").make(run, 0, 2040)
    assert made.column_names == ["id", "label", "embedding"]
    kind = made.schema.field("embedding").type
    assert pa.types.is_fixed_size_list(kind)
    assert kind.value_type == pa.float32()
    assert made["id"].to_pylist() == rows.id.tolist()
    assert rows.label is not None
    assert made["label"].to_pylist() == rows.label.tolist()
    features = made["embedding"].combine_chunks().flatten().to_numpy().reshape(2040, -1)
    assert np.allclose(features, run.embed(rows.image), atol=1e-5)


def test_variants_are_near_their_sources(run: TrainedModel, some_digits: str) -> None:
    dataset = Dataset.open(some_digits)
    rows = dataset.read("train")
    assert rows.label is not None
    work = Around(dataset, "train", copies=3, distance=0.0, seed=0)
    still = work.make(run, 4, 64)
    source = np.array(still["source"])
    assert source.tolist() == rows.id.repeat(3)[4:64].tolist()
    assert still["label"].to_pylist() == rows.label.repeat(3)[4:64].tolist()
    assert still["id"].to_pylist() == (source * 3 + np.arange(4, 64) % 3).tolist()
    expected = run.reconstruct(rows.image[:22]).repeat(3, 0)[4:64].astype(int)
    image = still["image"].combine_chunks().to_numpy_ndarray()
    assert np.abs(image - expected).max() <= 1  # at distance 0, the reconstruction

    moved = [
        replace(work, distance=distance, seed=seed).make(run, 4, 64)["image"].combine_chunks()
        for distance, seed in ((0.1, 0), (1.0, 0), (1.0, 1))
    ]
    a_little, far, elsewhere = (m.to_numpy_ndarray().astype(int) for m in moved)
    assert 0 < np.abs(a_little - image).mean() < np.abs(far - image).mean()
    assert not np.array_equal(far, elsewhere)
    assert not np.array_equal(far[2], far[3])  # two variants of one image


def test_rows_of_any_stretch(some_digits: str) -> None:
    dataset = Dataset.open("mnist")  # four files, row groups of 1,024
    groups = dataset.groups("train")
    assert len(dataset.info.splits["train"].shards) == 4
    whole = dataset.read("train")
    for start, stop in ((0, 1), (1000, 3000), (sum(groups[:16]) - 5, sum(groups[:16]) + 5)):
        rows = read(dataset, "train", start, stop)
        assert np.array_equal(rows.id, whole.id[start:stop])
        assert np.array_equal(rows.image, whole.image[start:stop])
    assert len(read(dataset, "train", 59_990, 60_000).id) == 10


def test_the_size_of_a_part_has_a_ceiling(run: TrainedModel, some_digits: str) -> None:
    assert part_size(FromNoise(10, 0), run) == part_size(FromNoise(100_000, 0), run) == 4096
    assert part_size(FromNoise(10**7, 0), run) == 10_000
    assert part_size(FromNoise(10**9, 0), run) == PART_BYTES // 784
    dataset = Dataset.open(some_digits)
    assert part_size(Embed(dataset, "train"), run) == 4 * 1024  # whole row groups
    many = Around(dataset, "train", copies=10**6, distance=1.0, seed=0)
    assert part_size(many, run) == PART_BYTES // 784  # of one image there may be more than fit


def test_samples_of_another_density_are_not_taken_for_the_same(run: TrainedModel) -> None:
    assert run.prior is not None
    moved = run.prior._replace(means=run.prior.means + 1)
    others = (None, moved)
    assert digest(run) == digest(replace(run))
    assert digest(run) not in {digest(replace(run, prior=prior)) for prior in others}
