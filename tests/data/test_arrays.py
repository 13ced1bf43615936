"""idx, npz and npy as sources."""

import gzip
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.datasets import labels_of
from helpers.random_images import Refused, WriteSource, pixels, read_sorted, rows_by_split

from cl_ray.data.dataset import Dataset

GREY, COLOR = pixels(6), pixels(6, 28, 28, 3)
LABELS = np.arange(6) % 3


def idx(array: np.ndarray) -> bytes:
    """Return an array of uint8 as an idx file."""
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.mark.parametrize(
    ("train", "test", "ending"),
    [
        ("train", "t10k", "-idx{}-ubyte"),
        ("train", "t10k", ".idx{}-ubyte.gz"),
        ("emnist-letters-train", "emnist-letters-test", "-idx{}-ubyte.gz"),
    ],
)
def test_idx(tmp_path: Path, write_source: WriteSource, train: str, test: str, ending: str) -> None:
    (tmp_path / "in").mkdir()
    for split, count in ((train, 6), (test, 2)):
        for kind, array in (("images", GREY[:count]), ("labels", LABELS[:count])):
            content = gzip.compress(idx(array)) if ending.endswith(".gz") else idx(array)
            (tmp_path / "in" / f"{split}-{kind}{ending.format(array.ndim)}").write_bytes(content)
    info, rows = write_source(tmp_path / "in")
    assert np.array_equal(rows.image[..., 0], GREY)
    assert labels_of(rows).tolist() == LABELS.tolist()
    assert rows_by_split(info) == {"train": 6, "test": 2}
    tested = read_sorted(Dataset.open(str(tmp_path / "made" / "set")), "test")
    assert labels_of(tested).tolist() == [0, 1]


NAMES = np.array(["cat", "ant", "bee"])[LABELS]
NPZ: dict[str, tuple[dict[str, Any], np.ndarray, list[str] | None]] = {
    "images and labels": ({"images": COLOR, "labels": LABELS}, COLOR, None),
    "Keras": ({"x_train": GREY, "y_train": LABELS, "x_test": GREY, "y_test": LABELS}, GREY, None),
    "columns": ({"xtrain": GREY, "ytrain": LABELS[:, None].astype(np.uint8)}, GREY, None),
    "MedMNIST": ({"train_images": COLOR, "train_labels": LABELS[:, None]}, COLOR, None),
    "camel": ({"trainX": COLOR, "trainY": LABELS.astype(float)}, COLOR, None),
    "arr": ({"arr_0": COLOR, "arr_1": LABELS}, COLOR, None),
    "channels first": ({"x": COLOR.transpose(0, 3, 1, 2).copy(), "y": LABELS}, COLOR, None),
    "one channel": ({"data": GREY[..., None], "target": LABELS}, GREY, None),
    "names": ({"x": COLOR, "y": NAMES}, COLOR, ["ant", "bee", "cat"]),
    "large": ({"x": COLOR, "y": LABELS + 10**6}, COLOR, ["1000000", "1000001", "1000002"]),
}


@pytest.mark.parametrize("form", NPZ)
def test_npz(tmp_path: Path, write_source: WriteSource, form: str) -> None:
    arrays, stored, classes = NPZ[form]
    save = np.savez_compressed if form == "Keras" else np.savez
    save(tmp_path / "data.npz", **arrays)
    info, rows = write_source(tmp_path / "data.npz")
    assert np.array_equal(rows.image, stored.reshape(6, 28, 28, -1))
    assert info.classes == classes
    expected = [2, 0, 1] * 2 if classes and classes[0] == "ant" else LABELS.tolist()
    assert labels_of(rows).tolist() == expected
    assert list(info.splits) == (["train", "test"] if "x_test" in arrays else ["train"])


def test_npy_and_no_labels(tmp_path: Path, write_source: WriteSource, notes: list[str]) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    np.save(folder / "faces.npy", GREY)
    np.save(folder / "ids.npy", LABELS)
    assert write_source(folder)[1].label is None
    assert "Left out, as neither images nor their labels: ids.npy." in notes
    (folder / "ids.npy").rename(folder / "faces_labels.npy")
    assert labels_of(write_source(folder)[1]).tolist() == LABELS.tolist()
    for k in range(3):
        np.save(folder / f"faces_{k}.npy", GREY[k : k + 1])
        np.save(folder / f"faces_labels_{k}.npy", LABELS[k : k + 1])
    (folder / "faces.npy").unlink()
    (folder / "faces_labels.npy").unlink()
    assert np.array_equal(write_source(folder)[1].image[..., 0], GREY[:3])


def test_labels_of_bytes(tmp_path: Path, write_source: WriteSource) -> None:
    names = np.array(["Äpfel", "Birnen"] * 3)
    np.savez(tmp_path / "in.npz", x=GREY, y=np.char.encode(names, "utf-8"))
    assert write_source(tmp_path / "in.npz")[0].classes == ["Birnen", "Äpfel"]


def test_arrays_refused(tmp_path: Path, write_source: WriteSource, refused: Refused) -> None:
    path = tmp_path / "in.npz"

    def told(flags: dict[str, Any] | None = None, **arrays: Any) -> str:
        np.savez(path, **arrays)
        return refused(path, **(flags or {}))

    assert "images.npy holds float32 values: convert them to uint8" in told(
        images=COLOR.astype(np.float32)
    )
    assert "labels.npy holds 5 labels of the 6 images" in told(images=COLOR, labels=LABELS[:5])
    message = told(a=COLOR, b=COLOR)
    assert "several arrays that can be images (a, b): name one with `--image-column`" in message
    assert write_source(path, image_column="b")[0].splits["train"].rows == 6
    message = told(images=COLOR, label=LABELS, target=LABELS)
    assert "several arrays that can be labels (label, target): name one with `--label" in message
    assert write_source(path, label_column="target")[0].labelled
    assert "holds Python objects" in told(images=COLOR, labels=np.array([{}] * 6, object))
    assert "without 1 or 3 channels" in told(images=pixels(6, 28, 28, 2))
    assert "holds no array of images" in told(y=LABELS)
    message = told({"label_column": "lable"}, x_train=GREY, y_train=LABELS)
    assert "has no array of labels lable (y_train): leave `--label-column` out or" in message
    message = told(x=COLOR[0])
    assert (
        "x.npy has the shape [28, 28, 3], which is that of one image: stack all images" in message
    )
    assert "has no training split but only test" in told(x_test=GREY)
    assert write_source(path, splits="none")[0].splits["train"].rows == 6
    assert "has 28 × 28 pixels, more than --max-pixels" in told({"max_pixels": 700}, x=GREY)
    assert "fractions, which are no classes" in told(x=GREY, y=LABELS / 2)


def test_damaged_arrays(tmp_path: Path, refused: Refused) -> None:
    file = tmp_path / "in" / "train-images-idx3-ubyte.gz"
    file.parent.mkdir()
    whole = idx(GREY)
    file.write_bytes(gzip.compress(whole[:-1]))
    assert "cannot be read as an array (it ends after 5 of 6 images)" in refused(file)
    file.write_bytes(gzip.compress(whole)[:-900])
    assert "cannot be read as an array (" in refused(file)
    file.write_bytes(whole)
    assert "cannot be read as an array (Not a gzipped file" in refused(file)
    header = struct.pack(">HBB3I", 0, 8, 3, 2**32 - 1, 2**32 - 1, 2**32 - 1)
    file.write_bytes(gzip.compress(header + bytes(2**20)))
    assert "pixels, more than --max-pixels" in refused(file, size=28)
    file.write_bytes(gzip.compress(b"\0\0\7\3"))
    assert "it is no idx file" in refused(file)


def test_labels_take_no_more_memory_than_their_bytes(tmp_path: Path, refused: Refused) -> None:
    count = 2**23
    (tmp_path / "in").mkdir()
    header = struct.pack(">HBB3I", 0, 8, 3, count, 28, 28)
    (tmp_path / "in" / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(header))
    labels = gzip.compress(idx(np.zeros(count)))
    (tmp_path / "in" / "train-labels-idx1-ubyte.gz").write_bytes(labels)
    tracemalloc.start()
    assert "(it ends after 0 of 8,388,608 images)" in refused(tmp_path / "in")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * count
