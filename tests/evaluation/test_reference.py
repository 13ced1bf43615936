"""The shipped reference keeps its promise; the command makes others; mistakes are named."""

import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.errors import UserError
from cl_ray.evaluation.reference import (
    INCEPTION_WEIGHTS,
    ReferenceClassifier,
    load_features,
    main,
)

TINY = ["--width", "4", "--features", "16", "--epochs", "2", "--batch-size", "32"]


@pytest.fixture(scope="module")
def mnist() -> ReferenceClassifier:
    return ReferenceClassifier.load("mnist")


@pytest.fixture(scope="module")
def some() -> Any:
    data = Dataset.open("mnist")
    rows = data.read("test", data.row_groups("test")[:1])
    assert rows.label is not None
    return rows.image[:600], rows.label[:600]


def test_the_shipped_reference_is_as_good_as_recorded(mnist: ReferenceClassifier) -> None:
    test = Dataset.open("mnist").read("test")
    right = mnist.predict(test.image).argmax(1) == test.label
    assert len(right) == mnist.about.images == 10_000
    assert mnist.about.measured_on == "test"
    # Another processor may round a digit that lies between two classes to the other one.
    assert abs(int(right.sum()) - round(mnist.about.accuracy * 10_000)) <= 2
    assert mnist.about.accuracy >= 0.995


def test_the_shipped_reference_says_what_it_is(mnist: ReferenceClassifier) -> None:
    assert mnist.name == "mnist-classifier"
    assert mnist.about.classes == list("0123456789")
    assert mnist.about.shape == (28, 28, 1)
    assert (files("cl_ray.evaluation") / "mnist.safetensors").stat().st_size < 1_500_000


def test_features_and_probabilities(mnist: ReferenceClassifier, some: Any) -> None:
    images, labels = some
    features = mnist.features(images)
    assert features.dtype == np.float32
    assert features.shape == (600, mnist.about.config.features)
    assert features.shape[1] <= 128
    assert features.min() >= 0
    assert (features.std(0) > 1e-3).mean() > 0.9  # hardly any says nothing
    found = mnist.predict(images)
    assert found.shape == (600, 10)
    assert np.allclose(found.sum(1), 1, atol=1e-5)
    assert np.array_equal(found, mnist.probabilities(features))
    chosen = found[np.arange(600), labels]
    assert np.median(chosen) > 0.99


def test_features_are_of_images_and_not_of_batches(mnist: ReferenceClassifier, some: Any) -> None:
    images = some[0]
    whole = mnist.features(images)
    turned = mnist.features(images[::-1].copy())[::-1]
    assert np.allclose(whole, turned, atol=1e-4)
    assert np.allclose(whole[3:5], mnist.features(images[3:5]), atol=1e-4)


def test_a_saved_reference_is_the_same(
    mnist: ReferenceClassifier, some: Any, tmp_path: Path
) -> None:
    path = tmp_path / "again.safetensors"
    mnist.save(str(path))
    assert path.read_bytes() == (files("cl_ray.evaluation") / "mnist.safetensors").read_bytes()
    again = load_features(str(path))
    assert isinstance(again, ReferenceClassifier)
    assert again.about == mnist.about
    assert np.array_equal(again.features(some[0][:50]), mnist.features(some[0][:50]))


@pytest.mark.parametrize(
    ("images", "words"),
    [
        (np.zeros((3, 32, 32, 1), np.uint8), r"mnist-classifier takes uint8.*\[3, 32, 32, 1\]"),
        (np.zeros((3, 28, 28, 3), np.uint8), r"\[N, 28, 28, 1\], not uint8 \[3, 28, 28, 3\]"),
        (np.zeros((3, 28, 28), np.uint8), r"not uint8 \[3, 28, 28\]"),
        (np.zeros((3, 28, 28, 1), np.float32), r"not float32 \[3, 28, 28, 1\]"),
        (np.zeros((0, 28, 28, 1), np.uint8), "no image at all"),
    ],
)
def test_other_images_are_refused(mnist: ReferenceClassifier, images: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        mnist.features(images)


def test_an_unknown_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reference cifar: give mnist, stacked-mnist, or"):
        load_features("cifar")
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes((files("cl_ray.evaluation") / "mnist.safetensors").read_bytes()[:-100])
    with pytest.raises(UserError, match=r"broken.safetensors is not a reference"):
        load_features(str(broken))
    broken.write_text("no weights at all")
    with pytest.raises(UserError, match=r"broken.safetensors is not a reference"):
        load_features(str(broken))


def test_weights_of_something_else_are_no_reference(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "else.safetensors"
    save_file({"weight": torch.ones(3)}, path)
    with pytest.raises(UserError, match=r"else.safetensors is not a reference"):
        load_features(str(path))


def test_inception_says_where_its_weights_are_from(tmp_path: Path) -> None:
    for name in ("inception", f"inception:{tmp_path}/none.pth"):
        with pytest.raises(UserError, match=f"download {INCEPTION_WEIGHTS} and give"):
            load_features(name)


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noise of three colours, 32 x 32, with a test split."""
    random = np.random.default_rng(0)

    def pictures(count: int) -> list[RawImage]:
        found = []
        for i in range(count):
            image = random.integers(0, 128, (32, 32, 3)).astype(np.uint8)
            image[..., i % 3] += 100
            found.append(RawImage(image, i % 3, f"noise {i}"))
        return found

    folder = str(tmp_path_factory.mktemp("colours") / "noise")
    about = DatasetMetadata("noise", "drawn", classes=["red", "green", "blue"])
    write_splits({"train": pictures(240), "test": pictures(60)}, folder, about)
    return folder


def test_the_command_makes_a_reference_of_other_data(
    colours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("first", "second")]
    for path in paths:
        main(["--data", colours, "--out", str(path), *TINY, "--views.warp", "0"])
    made = ReferenceClassifier.load(str(paths[0]))
    assert made.name == "noise-classifier"
    assert made.about.classes == ["red", "green", "blue"]
    assert made.about.shape == (32, 32, 3)
    assert (made.about.images, made.about.measured_on) == (60, "test")
    assert made.about.config.views.warp == 0
    assert made.about.config.width == 4
    test = Dataset.open(colours).read("test")
    accuracy = (made.predict(test.image).argmax(1) == test.label).mean()
    assert made.about.accuracy == accuracy > 0.9
    said = capsys.readouterr().out
    assert "epoch 2 of 2" in said
    assert f"{accuracy:.2%} of 60 test images" in said
    assert paths[0].read_bytes() == paths[1].read_bytes()  # nothing but the seed decides


def test_settings_are_chosen_without_the_test_images(
    colours: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(tmp_path / "held.safetensors")
    main(["--data", colours, "--out", path, "--hold-out", "0.1", *TINY])
    about = ReferenceClassifier.load(path).about
    assert (about.images, about.measured_on) == (24, "held out")
    assert "of 24 held out images" in capsys.readouterr().out


def plain(folder: Path, labelled: bool) -> str:
    pictures = [
        RawImage(np.full((28, 28, 1), i, np.uint8), i % 2 if labelled else None, f"grey {i}")
        for i in range(20)
    ]
    write_splits({"train": pictures}, str(folder), DatasetMetadata("grey", "drawn"))
    return str(folder)


@pytest.mark.parametrize(
    ("labelled", "out", "words"),
    [
        (True, "grey.safetensors", "has no split test.*--hold-out 0.1"),
        (False, "grey.safetensors", "has no labels"),
        (True, "nowhere/grey.safetensors", "no folder .*/nowhere to write"),
    ],
)
def test_what_the_command_cannot_do_is_one_sentence(
    labelled: bool,
    out: str,
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import re

    data = plain(tmp_path / "grey", labelled)
    with pytest.raises(SystemExit, match="1"):
        main(["--data", data, "--out", str(tmp_path / out), *TINY])
    said = capsys.readouterr().err
    assert re.fullmatch(f"reference: [^\n]*{words}[^\n]*\n", said)
    assert not (tmp_path / out).exists()


def test_references_need_no_ray() -> None:
    import subprocess

    code = (
        "import sys, cl_ray.evaluation.fidelity, cl_ray.evaluation.probes;"
        "from cl_ray.evaluation.reference import Reference; Reference.load('mnist');"
        "slow = {'ray', 'torchmetrics', 'sklearn'} & set(sys.modules); assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
