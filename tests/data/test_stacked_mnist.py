"""Stacked MNIST: every channel is a packaged digit, and the label says which."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
from helpers.datasets import labels_of
from helpers.random_images import Refused, WriteSource, read_sorted

from cl_ray.cli import main
from cl_ray.data import stacked_mnist
from cl_ray.data.dataset import Dataset
from cl_ray.data.stacked_mnist import STACKED_SHAPE, is_stacked_mnist, sample_triples

COUNTS = {"count": 300, "test_count": 120}


@pytest.fixture(autouse=True, scope="module")
def _digits_are_loaded_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stacked_mnist, "load_digits", lru_cache(stacked_mnist.load_digits))
        yield


def packaged(split: str) -> dict[bytes, tuple[int, int]]:
    """The id and the label of each packaged digit, by its pixels."""
    rows = Dataset.open("mnist").read(split)
    return {
        image.tobytes(): (int(number), int(label))
        for image, number, label in zip(rows.image, rows.id, labels_of(rows), strict=True)
    }


def test_channels_are_packaged_digits_and_labels_and_ids_say_which(
    tmp_path: Path, write_source: WriteSource
) -> None:
    info, _ = write_source("stacked-mnist", seed=5, **COUNTS)
    assert info.shape == STACKED_SHAPE
    assert info.classes is not None
    assert (len(info.classes), info.classes[7], info.classes[-1]) == (1000, "007", "999")
    assert info.licence == "CC BY-SA 3.0"
    assert is_stacked_mnist(info)
    assert "Stacked MNIST (Metz et al., 2017) of the packaged digits, seed 5: " in info.source
    for split, count in (("train", 300), ("validation", 120), ("test", 120)):
        known = packaged(split)
        ids = sorted(number for number, _ in known.values())
        rows = read_sorted(Dataset.open(str(tmp_path / "made" / "set")), split)
        assert len(rows.id) == count
        chosen = sample_triples(split, count, seed=5)
        for number, image, label in zip(rows.id, rows.image, labels_of(rows), strict=True):
            stacked = [known[image[..., channel].tobytes()] for channel in range(3)]
            assert [digit for digit, _ in stacked] == [ids[place] for place in chosen[number]]
            assert int("".join(str(digit) for _, digit in stacked)) == label
        assert len(set(labels_of(rows).tolist())) > count / 2  # no digit goes with another one


def test_the_seed_says_everything(write_source: WriteSource) -> None:
    first, rows = write_source("stacked-mnist", seed=1, **COUNTS)
    second, again = write_source("stacked-mnist", seed=1, **COUNTS)
    other, others = write_source("stacked-mnist", seed=2, **COUNTS)
    assert first == second  # the hash of each file included
    assert np.array_equal(rows.image, again.image)
    assert not np.array_equal(rows.image, others.image)
    assert other.splits["train"].shards[0].sha256 != first.splits["train"].shards[0].sha256
    assert np.array_equal(sample_triples("train", 500, 1)[:300], sample_triples("train", 300, 1))
    assert not np.array_equal(sample_triples("train", 300, 1), sample_triples("test", 300, 1))


def test_a_copy_is_still_known_and_a_changed_one_is_not(
    tmp_path: Path, write_source: WriteSource
) -> None:
    write_source("stacked-mnist", **COUNTS)
    made = (tmp_path / "made" / "set").rename(tmp_path / "first")
    copy, _ = write_source(made)
    assert is_stacked_mnist(copy)
    small, rows = write_source("stacked-mnist", size=32, color="grey", **COUNTS)
    assert rows.image.shape == (300, 32, 32, 1)
    assert not is_stacked_mnist(small)
    assert not is_stacked_mnist(Dataset.open("mnist").info)


def test_mistakes_say_what_to_do(
    refused: Refused, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert "the number of images of mnist is fixed" in refused("mnist", count=5)
    assert "test split of its own" in refused("stacked-mnist", test_fraction=0.1, **COUNTS)
    assert "closest: stacked-mnist" in refused("stacked_mnist")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        main(["train", "--data=stacked-mnist"])
    assert "`cl-ray data --source stacked-mnist --out data/stacked-mnist`" in (
        capsys.readouterr().err
    )
