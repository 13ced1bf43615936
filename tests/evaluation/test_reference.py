"""The packaged reference is as good as recorded; others are trained; errors."""

import subprocess
import sys
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import mnist as mnist_images
from helpers.datasets import write_images
from helpers.random_images import colour_noise
from helpers.run_folder import save_run, trained_run
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision import models

from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.evaluation.classifier import ClassifierConfig
from cl_ray.evaluation.config import EvaluationConfig
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.evaluation.metrics import MetricContext, available_metrics
from cl_ray.evaluation.reference import (
    INCEPTION_WEIGHTS,
    ReferenceClassifier,
    StackedReference,
    gives_labels,
    load_features,
    train_reference,
)
from cl_ray.evaluation.reference_name import resolve_reference
from cl_ray.model import TrainedModel

TINY = ClassifierConfig(width=4, features=16, epochs=2, batch_size=32)
PACKAGED = files("cl_ray.evaluation") / "mnist.safetensors"


@pytest.fixture(scope="module")
def mnist() -> ReferenceClassifier:
    return ReferenceClassifier.load("mnist")


def test_the_packaged_reference_is_as_good_as_recorded(mnist: ReferenceClassifier) -> None:
    test = Dataset.open("mnist").read("test")
    features = mnist.features(test.image)
    correct = mnist.labels(features) == test.label
    metadata = mnist.metadata
    assert (mnist.name, metadata.shape) == ("mnist-classifier", (28, 28, 1))
    assert metadata.classes == list("0123456789")
    assert len(PACKAGED.read_bytes()) < 1_500_000
    assert len(correct) == metadata.images == 10_000
    assert metadata.measured_on == "test"
    # Another processor may round a digit that lies between two classes to the other one.
    assert abs(int(correct.sum()) - round(metadata.accuracy * 10_000)) <= 2
    assert metadata.accuracy >= 0.995
    assert features.dtype == np.float32
    assert features.shape == (10_000, metadata.config.features)
    assert features.min() >= 0
    assert (features.std(0) > 1e-3).mean() > 0.9  # hardly any is constant
    probabilities = mnist.probabilities(features)
    assert np.allclose(probabilities.sum(1), 1, atol=1e-5)
    assert np.median(probabilities[np.arange(10_000), test.label]) > 0.99


def test_a_saved_reference_is_the_same(mnist: ReferenceClassifier, tmp_path: Path) -> None:
    path = tmp_path / "again.safetensors"
    mnist.save(str(path))
    again = load_features(str(path))
    assert isinstance(again, ReferenceClassifier)
    assert again.metadata == mnist.metadata
    blob = path.read_bytes()
    again.save(str(path))
    assert path.read_bytes() == blob
    weights = again.network.state_dict()
    assert all(torch.equal(w, weights[k]) for k, w in mnist.network.state_dict().items())
    images, _ = mnist_images("test", 50)
    assert np.array_equal(again.features(images), mnist.features(images))


def test_a_missing_or_broken_reference_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no reference cifar: give mnist, stacked-mnist, the"):
        load_features("cifar")
    broken = tmp_path / "broken.safetensors"
    save_file({"weight": torch.ones(3)}, broken)
    other = broken.read_bytes()
    for content in (PACKAGED.read_bytes()[:-100], b"no weights at all", other):
        broken.write_bytes(content)
        with pytest.raises(UserError, match=r"broken.safetensors is not a reference"):
            load_features(str(broken))
    for name in ("inception", f"inception:{tmp_path}/none.pth"):
        with pytest.raises(UserError, match=f"download {INCEPTION_WEIGHTS} and give"):
            load_features(name)


def test_auto_is_the_packaged_reference_only_for_its_images(tmp_path: Path) -> None:
    data = Dataset.open(write_images(tmp_path / "mnist", train=(random_images(20, 1), [0] * 20)))
    assert resolve_reference(data, "auto") is None  # whatever its name
    digits = Dataset.open("mnist")
    copy = replace(digits, info=digits.info.model_copy(update={"name": "copy"}))
    larger = replace(digits, info=digits.info.model_copy(update={"shape": (32, 32, 1)}))
    found = [resolve_reference(each, "auto") for each in (digits, copy, larger)]
    assert found == ["mnist", "mnist", None]
    assert resolve_reference(digits, "none") is None
    assert isinstance(load_features("stacked-mnist"), StackedReference)
    with pytest.raises(UserError, match=r"'stacked-mnist' takes images of \[28, 28, 3\], mnist"):
        Evaluator(digits, EvaluationConfig(reference="stacked-mnist"))


def test_a_folder_does_not_hide_a_reference_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, kind in (("mnist", ReferenceClassifier), ("stacked-mnist", StackedReference)):
        (tmp_path / name).mkdir()
        assert isinstance(load_features(name), kind)
        assert gives_labels(name)


def random_images(count: int, channels: int = 3) -> Any:
    return np.random.default_rng(1).integers(0, 256, (count, 28, 28, channels), np.uint8)


def test_d_of_another_run_measures_images_without_labels(tmp_path: Path) -> None:
    images = random_images(40)
    data = write_images(
        tmp_path / "bare", train=(images, [None] * 40), validation=(images[:20], [None] * 20)
    )
    trainer = trained_run(data)
    folder = str(save_run(trainer, tmp_path, step=2))
    model = TrainedModel.from_trainer(trainer)
    reference = load_features(folder)
    assert (reference.name, reference.shape) == ("D of demo", (28, 28, 3))
    assert np.array_equal(reference.features(images), model.embed(images))
    config = EvaluationConfig(reference=folder)
    with pytest.raises(UserError, match=r"takes images of \[28, 28, 3\], mnist has \[28, 28, 1\]"):
        Evaluator(Dataset.open("mnist"), config)
    dataset = Dataset.open(data)
    fidelity = Evaluator(dataset, config).evaluate(model).fidelity
    assert fidelity is not None
    assert (fidelity.features, fidelity.count, fidelity.histogram) == ("D of demo", 20, None)
    assert {"frechet", "precision"} <= fidelity.metrics.keys()
    assert "label_entropy" not in fidelity.metrics
    assert fidelity.metrics["frechet"].value > fidelity.metrics["frechet"].real_baseline > 0
    names = available_metrics(MetricContext.of(dataset, config, "none"))
    assert names[0] == "frechet"
    assert not {"label_entropy", "class_accuracy"} & set(names)
    with pytest.raises(UserError, match="is not a run folder"):
        load_features(str(tmp_path / "bare"))


def test_torchvision_models_give_the_input_of_their_last_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    name, weights = "shufflenet_v2_x0_5", models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    path = tmp_path / "hub" / "checkpoints" / Path(weights.url).name
    with pytest.raises(UserError, match=f"not at {path}, and nothing is downloaded: put https"):
        load_features(f"torchvision:{name}")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no weights")
    with pytest.raises(UserError, match=f"{path} does not hold the weights of {name}"):
        load_features(f"torchvision:{name}")
    torch.manual_seed(0)
    network = models.get_model(name).eval()
    torch.save(network.state_dict(), path)
    reference = load_features(f"torchvision:{name}")
    images = random_images(70)
    features = reference.features(images)
    assert (reference.name, reference.shape) == (name, None)
    assert features.shape == (70, 1024)
    assert features.dtype == np.float32
    last = torch.from_numpy(images[-2:]).permute(0, 3, 1, 2)
    with torch.inference_mode():
        logits = network.fc(torch.from_numpy(features[-2:]))
        assert torch.allclose(logits, network(weights.transforms()(last)), atol=1e-4)
    grey = random_images(2, channels=1)
    assert np.array_equal(reference.features(grey), reference.features(grey.repeat(3, axis=3)))
    with pytest.raises(UserError, match="torchvision has no classifier 'dino'"):
        load_features("torchvision:dino")


def test_transformers_models_give_their_pooled_or_first_token(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 14}
    torch.manual_seed(0)
    dino = transformers.Dinov2Model(transformers.Dinov2Config(**small, image_size=28))
    vit = transformers.ViTForImageClassification(transformers.ViTConfig(**small, image_size=42))
    crop = {"size": {"shortest_edge": 50}, "crop_size": {"height": 42, "width": 42}}
    processor = transformers.BitImageProcessor(**crop)
    for network in (dino, vit):
        processor.save_pretrained(tmp_path / network.config.model_type)
        network.eval().save_pretrained(tmp_path / network.config.model_type)
    images = random_images(70)
    pixels = processor([Image.fromarray(image) for image in images[-2:]], return_tensors="pt")
    with torch.inference_mode():
        expected = dino(**pixels).pooler_output, vit.vit(**pixels).last_hidden_state[:, 0]
    for name, tokens in zip(("dinov2", "vit"), expected, strict=True):
        reference = load_features(f"transformers:{tmp_path}/{name}")
        assert (reference.name, reference.shape) == (name, None)
        features = reference.features(images)
        assert features.shape == (70, 16)
        assert features.dtype == np.float32
        assert np.allclose(features[-2:], tokens, atol=1e-3)
    weights = tmp_path / "vit" / "model.safetensors"
    part = {k: w for k, w in load_file(weights).items() if "embeddings" not in k}
    save_file(part, weights, {"format": "pt"})
    with pytest.raises(UserError, match=r"transformers:.*/vit lacks the weights .*embeddings"):
        load_features(f"transformers:{tmp_path}/vit")
    weights.write_bytes(b"no weights")
    for name in ("vit", "nowhere"):
        with pytest.raises(UserError, match=f"/{name} cannot be loaded .* nothing is downloaded"):
            load_features(f"transformers:{tmp_path}/{name}")


def test_transformers_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="needs transformers: `pip install transformers`"):
        load_features("transformers:facebook/dinov2-small")


@pytest.fixture(scope="module")
def colours(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Noise of three colours, 32 x 32, with a test split."""
    folder, names = tmp_path_factory.mktemp("colours") / "noise", ["red", "green", "blue"]
    train, test = colour_noise(240), colour_noise(60, seed=1)
    return write_images(folder, classes=names, train=train, test=test)


def test_a_reference_is_trained_of_other_data(colours: str, tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.safetensors" for name in ("first", "second")]
    dataset, epochs = Dataset.open(colours), list[int]()
    for path in paths:
        train_reference(dataset, TINY, on_epoch=lambda n, _: epochs.append(n)).save(str(path))
    assert epochs == [1, 2, 1, 2]
    reference = ReferenceClassifier.load(str(paths[0]))
    metadata = reference.metadata
    assert reference.name == "noise-classifier"
    assert metadata.classes == ["red", "green", "blue"]
    assert metadata.shape == (32, 32, 3)
    assert (metadata.images, metadata.measured_on) == (60, "test")
    assert metadata.config == TINY
    test = dataset.read("test")
    accuracy = (reference.labels(reference.features(test.image)) == test.label).mean()
    assert metadata.accuracy == accuracy > 0.9
    assert paths[0].read_bytes() == paths[1].read_bytes()  # nothing but the seed decides
    metadata = train_reference(dataset, TINY, hold_out=0.1).metadata
    assert (metadata.images, metadata.measured_on) == (24, "held out")


@pytest.mark.parametrize(
    ("labels", "words"),
    [([0, 1] * 10, "has no split test.*hold_out=0.1"), ([None] * 20, "has no labels")],
)
def test_data_that_no_reference_can_be_trained_of(
    labels: list[Any], words: str, tmp_path: Path
) -> None:
    images = np.zeros((20, 28, 28, 1), np.uint8)
    data = write_images(tmp_path / "grey", train=(images, labels))
    with pytest.raises(UserError, match=words):
        train_reference(Dataset.open(data), TINY)


def test_metrics_need_no_ray_and_load_libraries_late() -> None:
    code = (
        "import sys, cl_ray.evaluation.evaluate;"
        "from cl_ray.evaluation.reference import load_features; load_features('mnist');"
        "slow = {'ray', 'torchmetrics', 'sklearn'} & set(sys.modules); assert not slow, slow"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
