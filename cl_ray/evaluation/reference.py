"""Reference features: the penultimate layer of a classifier of the data.

The classifier of MNIST ships with the package, made by `scripts/package_reference.py`; commands
train one of other data with labels (see `reference_cache.py`).

A distance over these features is not comparable with a published FID, which is over Inception's
(Heusel et al., 2017).
"""

import pickle
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import Field
from torch import Tensor, nn

from cl_ray.base_config import BaseConfig
from cl_ray.data.dataset import PACKAGED, STACKED, Dataset, sample_rows
from cl_ray.data.stacked_mnist import STACKED_MODES, STACKED_SHAPE, mode_labels
from cl_ray.errors import UserError, first_error_line
from cl_ray.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    Floats,
    Labels,
    Pixels,
    classifier_outputs,
    train_classifier,
)
from cl_ray.model import load
from cl_ray.storage import RunStorage, write_file

INCEPTION_WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)
_PRETRAINED_BATCH = 64
"""Images in one forward pass of a pretrained model, which enlarges them."""
_MEASURED = 10_000
"""Images that the accuracy of a reference is measured on, at most."""
_METADATA_KEY = "reference"
"""The file's only entry of metadata, JSON: safetensors writes several in any order."""


class ReferenceMetadata(BaseConfig):
    """Metadata in the file of a reference's weights."""

    data: str = Field(description="Name of the dataset.")
    shape: tuple[int, int, int] = Field(description="Height, width, channels.")
    classes: list[str] = Field(description="Names of the classes, in the order of their labels.")
    accuracy: float = Field(ge=0, le=1, description="Fraction of images it classifies correctly.")
    images: int = Field(ge=1, description="Number of images that the accuracy is measured on.")
    measured_on: Literal["test", "validation", "held out"] = Field(
        description="Images of that split, or training images that it was not trained on."
    )
    config: ClassifierConfig = Field(description="Architecture and training.")


class ReferenceClassifier:
    """A trained classifier of one kind of images.

    Attributes:
        name: Name of its features beside a metric, such as `mnist-classifier`.
        metadata: Metadata of the weights.
        shape: Height, width and channels of an image.
        classes: Number of classes.
    """

    def __init__(self, network: Classifier, metadata: ReferenceMetadata):
        self.network = network.eval().to(memory_format=torch.channels_last)  # as in training
        self.metadata = metadata
        self.shape = metadata.shape
        self.classes = len(metadata.classes)
        self.name = f"{metadata.data}-classifier"

    @classmethod
    def load(cls, name: str) -> "ReferenceClassifier":
        """Load `mnist` (packaged), or the file at a path that `save` wrote.

        Raises:
            UserError: It does not exist, or the file is not a reference.
        """
        packaged = str(files("cl_ray.evaluation") / "mnist.safetensors")
        path = packaged if name == "mnist" else name
        if not Path(path).is_file():
            raise UserError(
                f"There is no reference {name}: give mnist, {STACKED}, the path of a reference's "
                "file, a run, or a pretrained model such as torchvision:resnet50."
            )
        try:
            with safetensors.safe_open(path, "pt") as file:
                json = (file.metadata() or {})[_METADATA_KEY]
            metadata = ReferenceMetadata.model_validate_json(json)
            with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
                network = Classifier(metadata.shape, len(metadata.classes), metadata.config)
            network.load_state_dict(safetensors.torch.load_file(path))
            return cls(network, metadata)
        except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {first_error_line(error)}"
            raise UserError(
                f"{path} is not a reference ({reason}): write it again with `train_reference` of "
                "Python."
            ) from error

    def save(self, path: str) -> None:
        """Write weights and metadata; equal ones give equal bytes.

        Raises:
            UserError: The file cannot be written.
        """
        weights = {k: v.contiguous() for k, v in self.network.state_dict().items()}
        blob = safetensors.torch.save(weights, {_METADATA_KEY: self.metadata.model_dump_json()})
        try:
            write_file(Path(path), blob)
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror}.") from error

    def features(self, images: Pixels) -> Floats:
        """Compute the penultimate layer, float32 [N, d], not negative, of uint8 [N, H, W, C]."""
        return classifier_outputs(self.network.trunk, images)

    def probabilities(self, features: Floats) -> Floats:
        """Compute class probabilities, float32 [N, classes], from features."""
        with torch.inference_mode():
            return self.network.head(torch.from_numpy(features)).softmax(1).numpy()

    def labels(self, features: Floats) -> Labels:
        """Predict classes, int64 [N], from features."""
        return self.probabilities(features).argmax(1)


class StackedReference:
    """The packaged classifier of digits, applied to each channel of stacked digits.

    As in the papers that measure mode collapse by them (Metz et al., 2017, section 3.3.1; Lin et
    al., 2018). It classifies 98.9 % of real triples of test digits correctly.
    """

    name = "mnist-classifier by channel"
    shape = STACKED_SHAPE
    classes = STACKED_MODES

    def __init__(self) -> None:
        self.digits = ReferenceClassifier.load("mnist")

    def features(self, images: Pixels) -> Floats:
        """Compute the three channels' features, float32 [N, 3 d], of uint8 [N, 28, 28, 3]."""
        channels = np.moveaxis(images, 3, 1).reshape(-1, *STACKED_SHAPE[:2], 1)
        return self.digits.features(channels).reshape(len(images), -1)

    def labels(self, features: Floats) -> Labels:
        """Predict modes, int64 [N], 0 to 999, from features."""
        channels = features.reshape(3 * len(features), -1)
        return mode_labels(self.digits.labels(channels).reshape(-1, 3))


@dataclass(frozen=True)
class PretrainedReference:
    """Features by a pretrained network, which gives no labels.

    Args:
        name: Name of the features beside a metric, such as `dinov2-small`.
        features: Computes features, float32 [N, d], of uint8 images [N, H, W, C].
        shape: Height, width and channels of an image; None for images of any size.
    """

    name: str
    features: Callable[[Pixels], Floats]
    shape: tuple[int, int, int] | None = None


Reference = ReferenceClassifier | StackedReference | PretrainedReference
"""Computes features of images of its `shape`; None is any."""


def _inception(weights: str, device: torch.device) -> PretrainedReference:
    """Load the Inception of the FID (torchmetrics and torch-fidelity), from a file of weights."""
    if not Path(weights).is_file():
        raise UserError(
            f"Inception's weights are not at {weights or 'a given path'}: download "
            f"{INCEPTION_WEIGHTS} and give `inception:PATH`."
        )
    from torchmetrics.image.fid import NoTrainInceptionV3

    try:
        network = NoTrainInceptionV3("inception-v3-compat", ["2048"], weights)
    except ModuleNotFoundError as error:
        raise UserError(
            "Inception's features need torch-fidelity: `pip install torch-fidelity`."
        ) from error
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{weights} does not hold Inception's weights ({first_error_line(error)}): "
            f"download {INCEPTION_WEIGHTS}."
        ) from error
    return _vision_model("inception-v3", network.to(device), device)


def _torchvision(model: str, device: torch.device) -> PretrainedReference:
    """Load a classifier of torchvision with its default weights, without the last linear layer."""
    from torchvision import models

    if model not in models.list_models(models):
        raise UserError(
            f"torchvision has no classifier {model!r}: take one of "
            "https://docs.pytorch.org/vision/stable/models.html, such as torchvision:resnet50."
        )
    weights = models.get_model_weights(model).DEFAULT
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    if not path.is_file():
        raise UserError(
            f"The weights of torchvision:{model} are not at {path}, and nothing is downloaded: "
            f"put {weights.url} there."
        )
    try:
        network = models.get_model(model, weights=weights).eval()
    except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} does not hold the weights of {model} ({first_error_line(error)}): put "
            f"{weights.url} there."
        ) from error
    linear = [name for name, layer in network.named_modules() if isinstance(layer, nn.Linear)]
    if linear:
        network.set_submodule(linear[-1], nn.Identity())
    network, prepare = network.to(device), weights.transforms()
    return _vision_model(model, lambda images: network(prepare(images)), device)


def _transformers(model: str, device: torch.device) -> PretrainedReference:
    """Load a vision model of Hugging Face from a folder or from the hub's cache."""
    try:
        from transformers import AutoImageProcessor, AutoModel
        from transformers.utils import logging
    except ImportError as error:
        raise UserError(
            f"transformers:{model} needs transformers: `pip install transformers`."
        ) from error
    logging.set_verbosity_error()  # what matters of its notes is checked here
    logging.disable_progress_bar()
    try:
        prepare = AutoImageProcessor.from_pretrained(model, local_files_only=True)
        network, loaded = AutoModel.from_pretrained(
            model, local_files_only=True, output_loading_info=True, dtype=torch.float32
        )
    except (OSError, ValueError, RuntimeError, safetensors.SafetensorError) as error:
        reason = first_error_line(error).split(". ")[0]
        raise UserError(
            f"transformers:{model} cannot be loaded ({reason}): give the folder of a vision model, "
            "or one that `hf download OWNER/NAME` has brought; nothing is downloaded here."
        ) from error
    missing = sorted(loaded["missing_keys"])
    # A classifier such as ViT's has no weights of the pooler, which would be random.
    if unknown := [key for key in missing if "pooler" not in key]:
        raise UserError(
            f"transformers:{model} lacks the weights {unknown[0]}: give a complete model."
        )
    encode = getattr(network.eval().to(device), "get_image_features", network)  # as in CLIP

    def forward(images: Tensor) -> Tensor:
        pixels = prepare(images, return_tensors="pt")["pixel_values"]
        output = encode(pixel_values=pixels.to(device))
        if output.get("pooler_output") is not None and not missing:
            return output.pooler_output
        hidden = output.last_hidden_state
        return hidden[:, 0] if hidden.ndim == 3 else hidden.mean((2, 3))

    return _vision_model(Path(model).name, forward, device)


def _vision_model(
    name: str, forward: Callable[[Tensor], Tensor], device: torch.device
) -> PretrainedReference:
    """Return a reference by the features [B, ...] of uint8 images [B, 3, H, W] on a device."""

    def compute(images: Pixels) -> Floats:
        rgb = torch.from_numpy(images).permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        with torch.inference_mode():
            parts = [
                forward(part.to(device).contiguous()).flatten(1).cpu()
                for part in rgb.split(_PRETRAINED_BATCH)
            ]
        return torch.cat(parts).numpy()

    return PretrainedReference(name, compute)


_PRETRAINED: dict[str, Callable[[str, torch.device], PretrainedReference]] = {
    "inception": _inception,
    "torchvision": _torchvision,
    "transformers": _transformers,
}
"""What loads the pretrained model MODEL of a reference `KIND:MODEL`."""


def _is_run(name: str) -> bool:
    return "://" in name or (name not in (PACKAGED, STACKED) and Path(name).is_dir())


def gives_labels(name: str) -> bool:
    """Return whether the reference of that name predicts labels, as classifiers of the data do."""
    return name.partition(":")[0] not in _PRETRAINED and not _is_run(name)


def load_features(name: str, device: torch.device | str = "cpu") -> Reference:
    """Load a reference by name.

    Args:
        name: As for `ReferenceClassifier.load`; `stacked-mnist`; a run's folder or URI, for the
            representation of its D; `inception:PATH`; `torchvision:NAME`; or `transformers:MODEL`,
            a name or a folder. Nothing is downloaded.
        device: Where pretrained networks compute.

    Raises:
        UserError: There is no such reference.
    """
    if name == STACKED:
        return StackedReference()
    kind, _, model = name.partition(":")
    device = torch.device(device)
    if kind in _PRETRAINED:
        return _PRETRAINED[kind](model, device)
    if not _is_run(name):
        return ReferenceClassifier.load(name)
    run = load(name, device=device.type)
    return PretrainedReference(f"D of {RunStorage.from_uri(name).name}", run.embed, run.shape)


def check_finite(features: Floats, kind: str) -> None:
    """Check that features [N, d] are finite.

    Raises:
        UserError: One is NaN or Inf; names the first such row as a `kind`.
    """
    finite = np.isfinite(features).all(1)
    if not finite.all():
        row = int(np.flatnonzero(~finite)[0])
        raise UserError(
            f"The features of {kind} {row} are NaN or Inf: the network that computed the image or "
            "the features has damaged weights."
        )


def labelled_held_out(dataset: Dataset) -> Literal["test", "validation"] | None:
    """Return the split whose labels a reference is measured on; None if there is none."""
    for split in ("test", "validation"):
        if split in dataset.info.splits and dataset.info.labelled_rows(split):
            return split
    return None


def train_reference(
    dataset: Dataset,
    config: ClassifierConfig,
    hold_out: float = 0.0,
    images: int | None = None,
    on_epoch: Callable[[int, float], None] | None = None,
) -> ReferenceClassifier:
    """Train a reference on the split train and measure its accuracy.

    Args:
        dataset: Labelled images.
        config: Architecture and training.
        hold_out: Fraction of the training images that the accuracy is measured on; 0 measures it
            on the split test, or else validation.
        images: Draw so many labelled training images at random; None takes all.
        on_epoch: See `train_classifier`.

    Raises:
        UserError: The data has no labels or one class, or no images to measure the accuracy on.
    """
    info = dataset.info
    rows = sample_rows(dataset, "train", images, config.seed, labelled=True) if images else None
    train = (rows or dataset.read("train")).labelled()
    if train.label is None:
        raise UserError(f"{dataset.location} has no labels to train a reference on.")
    if (train.label == train.label[0]).all():
        raise UserError(
            f"The training images of {dataset.location} are of one class: a reference classifier "
            "needs two or more."
        )
    classes = dataset.class_names()
    order = np.random.default_rng(config.seed).permutation(len(train.image))
    held_out, fitted = np.split(order, [int(hold_out * len(order))])
    measured_on: Literal["test", "validation", "held out"]
    if len(held_out):
        measured, measured_on = train.take(held_out), "held out"
    elif split := labelled_held_out(dataset):
        measured = sample_rows(dataset, split, _MEASURED, config.seed).labelled()
        measured_on = split
    else:
        raise UserError(
            f"{dataset.location} has no split test with labels to measure the accuracy on: hold "
            "out some training images, such as hold_out=0.1."
        )
    images_fitted, labels = train.image[fitted], train.label[fitted]
    network = train_classifier(images_fitted, labels, len(classes), config, on_epoch)
    predicted = classifier_outputs(network, measured.image).argmax(1)
    metadata = ReferenceMetadata(
        data=info.name,
        shape=info.shape,
        classes=classes,
        accuracy=float((predicted == measured.label).mean()),
        images=len(predicted),
        measured_on=measured_on,
        config=config,
    )
    return ReferenceClassifier(network, metadata)
