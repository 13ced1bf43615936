"""The read side of data at rest, on real Parquet files."""

import hashlib
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers.datasets import labels_of
from helpers.hostile_images import png_header
from helpers.random_images import METADATA, images, png, raw_images, smooth_images
from helpers.refusal import error_of
from PIL import Image

from cl_ray.data import dataset as dataset_module
from cl_ray.data.dataset import Dataset, RowBatch, RowRange, SplitInfo, sample_rows
from cl_ray.data.decoding import Encoding
from cl_ray.data.writer import write_splits
from cl_ray.errors import UserError


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, np.ndarray]:
    """200 colour images in row groups of 85, 85 and 30; returned in the source's order."""
    out = str(tmp_path_factory.mktemp("data") / "big")
    pixels = images(200, 64, 3)
    write_splits({"train": raw_images(pixels, labelled=True)}, out, METADATA)
    return out, pixels


def test_packaged_digits_are_mnist() -> None:
    data = Dataset.open("mnist")
    kept, held_out, test = (data.read(split) for split in ("train", "validation", "test"))
    train = RowBatch(
        np.concatenate([kept.id, held_out.id]),
        np.concatenate([kept.image, held_out.image]),
        np.concatenate([labels_of(kept), labels_of(held_out)]),
    )
    assert kept.image.shape == (55000, 28, 28, 1)
    assert train.image.shape == (60000, 28, 28, 1)
    assert test.image.shape == (10000, 28, 28, 1)
    # The published counts, first digits, mean and standard deviation.
    counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    assert np.bincount(labels_of(train)).tolist() == counts
    assert np.abs(np.bincount(labels_of(held_out)) - np.divide(counts, 12)).max() <= 1
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(labels_of(test)).tolist() == counts
    assert labels_of(train)[np.argsort(train.id)][:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert labels_of(test)[np.argsort(test.id)][:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    scaled = train.image / np.float32(255)
    assert round(float(scaled.mean()), 4) == 0.1307
    assert round(float(scaled.std()), 4) == 0.3081
    for rows in (train, test):
        assert np.array_equal(np.sort(rows.id), np.arange(len(rows.id)))
        assert not np.array_equal(rows.id, np.sort(rows.id))
    digits = train.image[:1000].reshape(1000, -1) / 255
    distances = [np.linalg.norm(digits[500:] - image, axis=1) for image in digits[:200]]
    for q in (0.1, 0.5, 0.9):
        expected = np.quantile(distances, q)
        assert data.distance_quantile("train", q) == pytest.approx(expected, rel=0.02)


def test_packaged_files_are_as_recorded() -> None:
    data = Dataset.open("mnist")
    folder = Path(dataset_module.open_dataset_location("mnist")[1])
    shards = [shard for split in data.info.splits.values() for shard in split.shards]
    assert [len(split.shards) for split in data.info.splits.values()] == [4, 1, 1]
    for shard in shards:
        content = (folder / shard.file).read_bytes()
        assert len(content) == shard.bytes
        assert hashlib.sha256(content).hexdigest() == shard.sha256
    assert sum(shard.bytes for shard in shards) < 11e6
    assert data.info.licence == "CC BY-SA 3.0"
    assert "Share Alike 3.0" in (folder / "LICENCE.md").read_text()
    assert data.info.classes == list("0123456789")


def test_classes_are_counted_of_whole_and_of_part() -> None:
    data = Dataset.open("mnist")
    for split in ("train", "test"):
        labels = labels_of(data.read(split))
        assert data.class_counts(split) == np.bincount(labels).tolist()
    first, *others = data.info.splits["train"].shards
    cut = [first, others[0].model_copy(update={"rows": 1024})]
    rows = first.rows + 1024
    part = SplitInfo(rows=rows, shards=cut, distances=data.info.splits["train"].distances)
    fewer = Dataset("mnist", data.info.model_copy(update={"splits": {"train": part}}))
    labels = labels_of(data.read("train"))
    assert fewer.class_counts("train") == np.bincount(labels[:rows]).tolist()
    for call in (data.row_groups, data.read, data.class_counts):
        with pytest.raises(UserError, match="has no split holdout: it has train, validation, test"):
            call("holdout")


def test_import_and_reading_need_neither_torch_nor_ray_nor_pandas() -> None:
    code = (
        "import sys; from cl_ray.data import dataset, writer\n"
        "dataset.Dataset.open('mnist').read('test')\n"
        "print([m for m in ('torch', 'torchvision', 'ray', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_columns_row_groups_and_files_on_disk(tmp_path: Path, big: tuple[str, np.ndarray]) -> None:
    file = pq.ParquetFile(Path(big[0], "train-00000-of-00001.parquet"))
    assert file.schema_arrow.field("image").type == pa.binary(64 * 64 * 3)
    assert file.schema_arrow.field("id").type == pa.int64()
    assert file.schema_arrow.field("label").type == pa.int64()
    groups = [file.metadata.row_group(k) for k in range(file.num_row_groups)]
    assert [group.num_rows for group in groups] == [85, 85, 30]
    assert groups[0].column(1).compression == "ZSTD"
    pixels = images(85 * 16 + 5, 64, 3)
    info = write_splits({"train": raw_images(pixels)}, str(tmp_path / "set"), METADATA)
    assert [shard.rows for shard in info.splits["train"].shards] == [85 * 8, 85 * 8 + 5]
    data = Dataset.open(str(tmp_path / "set"))
    assert [group.rows for group in data.row_groups("train")] == [85] * 16 + [5]
    assert data.row_groups("train")[8] == RowRange(1, 0, 0, 85)
    rows = data.read("train")
    assert np.array_equal(rows.image, pixels[rows.id])


def test_only_the_wanted_row_groups_are_read_and_damage_is_named(
    big: tuple[str, np.ndarray], tmp_path: Path
) -> None:
    data = Dataset.open(big[0])
    shard = data.info.splits["train"].shards[0]
    content = bytearray(Path(big[0], shard.file).read_bytes())
    metadata = pq.ParquetFile(Path(big[0], shard.file)).metadata
    content[metadata.row_group(1).column(1).data_page_offset + 5000] ^= 1
    (tmp_path / shard.file).write_bytes(content)
    (tmp_path / "dataset.json").write_text(Path(big[0], "dataset.json").read_text())
    damaged = Dataset.open(str(tmp_path))
    fine = [RowRange(0, 0, 0, 85), RowRange(0, 2, 0, 30)]
    assert np.array_equal(damaged.read("train", fine).image, data.read("train", fine).image)
    with pytest.raises(UserError, match=rf"{tmp_path}/{shard.file} is damaged .*CRC") as caught:
        damaged.read("train", [RowRange(0, 1, 0, 1)])
    assert "copy it again" in str(caught.value)
    content[-20] ^= 255  # the footer
    (tmp_path / shard.file).write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        Dataset.open(str(tmp_path)).read("train")


def test_images_of_another_shape_are_not_read(tmp_path: Path) -> None:
    write_splits({"train": raw_images(images(9))}, str(tmp_path / "set"), METADATA)
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(np.zeros((9, 28, 28, 3), np.uint8))
    data = with_cells(tmp_path / "set", column)
    with pytest.raises(UserError, match=r"set/train-0.* is damaged .*its images are extension"):
        data.read("train")


ENCODINGS: tuple[Encoding, ...] = ("raw", "png", "webp", "jpeg")


@pytest.mark.parametrize("channels", [1, 3])
def test_pixels_are_the_same_in_every_lossless_encoding(tmp_path: Path, channels: int) -> None:
    pixels = images(300, 68, channels)
    read: dict[str, RowBatch] = {}
    prints = set[str]()
    for encoding in ENCODINGS:
        raw = (replace(r, origin=f"{n}.png") for n, r in enumerate(raw_images(pixels, True)))
        out = str(tmp_path / encoding)
        info = write_splits({"train": raw}, out, METADATA, encoding=encoding)
        data = Dataset.open(out)
        assert data.info == info
        assert info.encoding == encoding
        prints.add(info.fingerprint)
        ranges = [RowRange(0, 1, 3, 30), RowRange(0, 0, 7, 8), RowRange(0, 1, 0, 5)]
        read[encoding], part = data.read("train", origins=True), data.read("train", ranges)
        index = np.r_[info.row_group + 3 : info.row_group + 30, 7, info.row_group + np.arange(5)]
        assert np.array_equal(part.image, read[encoding].image[index])
        assert data.read("train", []).image.shape == (0, 68, 68, channels)
        origin = read[encoding].origin
        assert origin is not None
        assert origin.tolist() == [f"{n}.png" for n in read[encoding].id]
        assert np.array_equal(labels_of(read[encoding]), read[encoding].id % 3)
        sample = sample_rows(data, "train", 40, seed=1)
        whole = read[encoding].sorted_by_id().image
        assert np.array_equal(sample.image, whole[sample.id])
    assert len(prints) == len(ENCODINGS)
    for encoding in ("png", "webp"):
        assert np.array_equal(read[encoding].id, read["raw"].id)
        assert np.array_equal(read[encoding].image, pixels[read["raw"].id])
    assert not np.array_equal(read["jpeg"].image, read["raw"].image)


def test_jpeg_is_read_as_pillow_reads_it(tmp_path: Path) -> None:
    pixels = smooth_images(70, 80)
    distances = {}
    for quality in (95, 20):
        out = tmp_path / str(quality)
        info = write_splits(
            {"train": raw_images(pixels)}, str(out), METADATA, encoding="jpeg", quality=quality
        )
        distances[quality] = info.splits["train"].distances
        table = pq.read_table(out / info.splits["train"].shards[0].file)
        decoded = [np.asarray(Image.open(BytesIO(cell.as_py()))) for cell in table["image"]]
        rows = Dataset.open(str(out)).read("train")
        assert np.array_equal(rows.image, np.stack(decoded))
        error = np.abs(rows.image.astype(int) - pixels[rows.id]).mean()
        assert (error < 2) == (quality == 95)
        flat = rows.image[:, ::2, ::2].reshape(len(rows.id), -1) / 255
        first, second = np.triu_indices(len(flat), 1)
        exact = np.linalg.norm(flat[first] - flat[second], axis=1)
        assert distances[quality] == pytest.approx(
            np.quantile(exact, np.linspace(0, 1, 101)), abs=1e-6
        )


def with_cells(folder: Path, cells: Any) -> Dataset:
    """Put other cells in place of the images of a dataset of one shard."""
    record = json.loads((folder / "dataset.json").read_text())
    (shard,) = record["splits"]["train"]["shards"]
    table = pa.table({"id": range(len(cells)), "image": cells})
    pq.write_table(table, folder / shard["file"], row_group_size=record["row_group"])
    shard["bytes"] = (folder / shard["file"]).stat().st_size
    (folder / "dataset.json").write_text(json.dumps(record))
    return Dataset.open(str(folder))


def test_an_image_that_is_cut_or_another_is_named_with_its_row(tmp_path: Path) -> None:
    pixels = images(70, 80, 3)
    folder = tmp_path / "set"
    write_splits({"train": raw_images(pixels)}, str(folder), METADATA)
    good = png(pixels[0])
    bad: dict[str, bytes | None] = {
        "truncated": good[: len(good) // 2],
        "broken": good[:100] + bytes(200) + good[300:],
        "it is not PNG": b"GIF89a",
        "not PNG": None,
        "it is 81 × 80, RGB, and not 80 × 80, RGB": png(np.zeros((80, 81, 3), np.uint8)),
        "it is 80 × 80, L,": png(pixels[0, :, :, 0]),
        "pixels": png_header(50_000, 50_000),
    }
    for reason, cell in bad.items():
        data = with_cells(folder, [good] * 67 + [cell] + [good] * 2)
        fine = [RowRange(0, 0, 0, 64), RowRange(0, 1, 0, 3)]  # the others are not decoded
        assert np.array_equal(data.read("train", fine).image[66], pixels[0])
        with pytest.raises(UserError, match=f"is damaged .*row 67: .*{reason}") as caught:
            data.read("train")
        assert f"{folder}/train-00000-of-00001.parquet" in str(caught.value)
        assert "\n" not in str(caught.value)


def test_it_travels_by_pickle_and_between_working_directories(
    big: tuple[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(big[0]).parent)
    data = Dataset.open("big")
    monkeypatch.chdir(tmp_path)
    assert data.location == big[0]
    content = pickle.dumps(data)
    assert len(content) < 10_000
    assert pickle.loads(content) == data
    assert len(pickle.loads(content).read("train").id) == 200


def test_distances_are_quantiles_over_all_pairs(tmp_path: Path) -> None:
    pixels = images(50)
    pixels[1] = pixels[0]
    pixels[3] = pixels[2]
    pixels[3, 5, 5, 0] ^= 1  # the nearest but one: exactly 1 / 255
    write_splits({"train": raw_images(pixels)}, str(tmp_path / "set"), METADATA)
    data = Dataset.open(str(tmp_path / "set"))
    flat = pixels.reshape(50, -1) / 255
    pairs = np.triu_indices(50, 1)
    exact = np.linalg.norm(flat[pairs[0]] - flat[pairs[1]], axis=1)
    table = data.info.splits["train"].distances
    assert len(table) == 101
    assert table == pytest.approx(np.quantile(exact, np.linspace(0, 1, 101)), abs=1e-6)
    assert data.distance_quantile("train", 0) == 0
    assert data.distance_quantile("train", 0.25) == pytest.approx(table[25])
    assert data.distance_quantile("train", 0.255) == pytest.approx((table[25] + table[26]) / 2)
    with pytest.raises(ValueError, match="not in"):
        data.distance_quantile("train", 1.5)
    one = write_splits({"train": raw_images(images(1))}, str(tmp_path / "one"), METADATA)
    assert one.splits["train"].distances == []
    with pytest.raises(UserError, match="one image only"):
        Dataset.open(str(tmp_path / "one")).distance_quantile("train", 0.5)


def test_as_many_rows_are_sampled_as_asked_for_from_small_row_groups(
    small_groups: Callable[[int], Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dataset_module, "_SAMPLED_GROUPS", 1)
    for count in (64, 300, 347, 1000):  # of 347 rows in groups of 64, the last of 27
        rows = sample_rows(small_groups(347), "train", count, seed=0)
        assert len(np.unique(rows.id)) == len(rows.id) == min(count, 347)


def open_error(location: str | Path) -> str:
    message = error_of(Dataset.open, str(location))
    assert str(location) in message
    return message


def test_what_is_no_dataset_is_named(tmp_path: Path, big: tuple[str, np.ndarray]) -> None:
    assert "is not a folder" in open_error(tmp_path / "nowhere")
    file = Path(big[0], "dataset.json")
    assert "is not a folder" in open_error(file)
    message = open_error(tmp_path)
    assert (
        f"has no dataset.json: make a dataset of it with `cl-ray data --source {tmp_path}"
        in message
    )
    assert "cannot be opened" in open_error("nosuch://bucket/key")
    assert "is not a folder" in open_error(f"file://{tmp_path}/nowhere")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("{", "", "Invalid JSON"),
        ('"format_version": 2', '"format_version": 1', "format_version"),
        ('"rows": 200', '"rows": 201', "do not add up"),
        ('"name"', '"title"', "name: Field required"),
        ("train-00000", "../../x", "String should match"),
        ('"shape": [\n  64,', '"shape": [\n  60,', "not a square"),
    ],
)
def test_broken_record_is_named(
    tmp_path: Path, big: tuple[str, np.ndarray], old: str, new: str, message: str
) -> None:
    text = Path(big[0], "dataset.json").read_text()
    assert old in text
    (tmp_path / "dataset.json").write_text(text.replace(old, new, 1))
    assert message in open_error(tmp_path)


def test_missing_and_truncated_files_are_named(tmp_path: Path, big: tuple[str, np.ndarray]) -> None:
    (tmp_path / "dataset.json").write_text(Path(big[0], "dataset.json").read_text())
    file = tmp_path / "train-00000-of-00001.parquet"
    assert f"{file} is missing" in open_error(tmp_path)
    content = Path(big[0], file.name).read_bytes()
    file.write_bytes(content[:1000])
    assert f"{file} has 1,000 bytes and not the {len(content):,} recorded" in open_error(tmp_path)
