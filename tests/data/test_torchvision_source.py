"""torchvision's datasets as a source, from real files, and what cannot be had."""

import struct
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import labels_of
from helpers.random_images import Refused, WriteSource, pixels, rows_by_split, save
from PIL import Image


def idx(path: Path, array: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(header + array.tobytes())


def fashion(root: Path) -> tuple[np.ndarray, np.ndarray]:
    raw = root / "FashionMNIST" / "raw"
    images, labels = pixels(20), np.arange(20, dtype=np.uint8) % 10
    idx(raw / "train-images-idx3-ubyte", images)
    idx(raw / "train-labels-idx1-ubyte", labels)
    idx(raw / "t10k-images-idx3-ubyte", images[:7])
    idx(raw / "t10k-labels-idx1-ubyte", labels[:7])
    return images, labels


def test_torchvision_by_name(tmp_path: Path, write_source: WriteSource) -> None:
    images, labels = fashion(tmp_path / "root")
    info, rows = write_source("FashionMNIST", root=str(tmp_path / "root"))
    assert np.array_equal(rows.image[..., 0], images)
    assert np.array_equal(labels_of(rows), labels)
    assert info.splits["test"].rows == 7
    assert (info.source, info.name) == ("torchvision FashionMNIST", "set")
    assert info.classes is not None
    assert info.classes[:2] == ["T-shirt/top", "Trouser"]


def test_torchvision_with_split_val_and_no_test(
    tmp_path: Path, write_source: WriteSource, refused: Refused
) -> None:
    images = pixels(4, 40, 60, 3)
    for number, name in enumerate(
        ("train/n01440764", "train/n02979186", "val/n01440764", "val/n02979186")
    ):
        save(tmp_path / "root" / "imagenette2" / name / "1.jpeg", images[number], quality=95)
    info, rows = write_source("Imagenette", root=str(tmp_path / "root"), size=32)
    assert rows_by_split(info) == {
        "train": 2,
        "validation": 2,
    }
    assert info.classes == ["tench, Tinca tinca", "cassette player"]
    assert info.shape == (32, 32, 3)
    assert labels_of(rows).tolist() == [0, 1]
    message = refused("Imagenette", root=str(tmp_path / "root"), size=28, max_pixels=2399)
    assert "Imagenette train 0 has 60 × 40 pixels, more than --max-pixels 2,399" in message
    assert Image.open.__module__ == "PIL.Image"


def test_torchvision_that_cannot_be_downloaded(
    tmp_path: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision

    monkeypatch.setattr(torchvision.datasets.KMNIST, "mirrors", ["http://127.0.0.1:9/"])
    message = refused("KMNIST", root=str(tmp_path / "root"))
    assert f"KMNIST is not complete under {tmp_path}/root and cannot be downloaded" in message
    assert "refused" in message
    assert "--root" in message


def test_torchvision_files_that_are_damaged(tmp_path: Path, refused: Refused) -> None:
    fashion(tmp_path / "root")
    path = tmp_path / "root" / "FashionMNIST" / "raw" / "train-images-idx3-ubyte"
    path.write_bytes(path.read_bytes()[:1000])
    message = refused("FashionMNIST", root=str(tmp_path / "root"))
    assert f"FashionMNIST is not complete under {tmp_path}/root" in message


def test_unknown_name_is_told_the_closest(refused: Refused) -> None:
    message = refused("fashion_mnist")
    assert "fashion_mnist is neither a folder nor a dataset of torchvision's" in message
    assert "closest: FashionMNIST" in message
    names = message.split("one of ")[1].rstrip(".").split(", ")
    wanted = {"MNIST", "KMNIST", "CIFAR10", "CIFAR100", "SVHN", "STL10", "EMNIST-letters"}
    assert wanted < set(names)
    # Pairs of images, videos and generic loaders are no sets of single images.
    assert not {"ImageFolder", "KittiFlow", "HMDB51", "EMNIST", "VisionDataset"} & set(names)
