"""Reference features: a classifier of the data whose penultimate layer others are measured by.

The one for MNIST travels with the package. The command that made it makes one for any other data
set with labels:

    python -m cl_ray.evaluation.reference --data mnist --out mnist.safetensors

A distance over these features is a Fréchet distance over a classifier's features, and never
comparable with a published FID, which is over Inception's (Heusel et al., 2017).
"""

import pickle
import sys
import time
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import safetensors
import safetensors.torch
import torch
from pydantic import Field

from cl_ray.base_config import BaseConfig
from cl_ray.data.dataset import STACKED, Dataset, first_error_line
from cl_ray.data.stacked_mnist import SHAPE, STACKED_MODES, mode_labels
from cl_ray.device import keep_freed_memory
from cl_ray.errors import UserError
from cl_ray.evaluation.classifier import (
    AT_A_TIME,
    Classifier,
    ClassifierConfig,
    Floats,
    Labels,
    Pixels,
    classifier_outputs,
    train_classifier,
)

PACKAGED = ("mnist",)
ENTRY = "reference"
"""The file's one entry of metadata, JSON: several would be written in any order."""
INCEPTION = "inception"
INCEPTION_WEIGHTS = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"
)


class FeatureExtractor(Protocol):
    """Whatever turns images into features."""

    name: str
    shape: tuple[int, int, int] | None
    """Of the images that it takes; None is any."""

    def features(self, images: Pixels) -> Floats:
        """Features [N, d] of images [N, H, W, C]."""


class ReferenceMetadata(BaseConfig):
    """What is recorded with a reference's weights, in their file."""

    data: str = Field(description="The data set's name.")
    shape: tuple[int, int, int] = Field(description="Height, width, channels.")
    classes: list[str] = Field(description="Names of the classes, in the order of their labels.")
    accuracy: float = Field(ge=0, le=1, description="Share of images that it labels rightly.")
    images: int = Field(ge=1, description="Of how many images that is the share.")
    measured_on: Literal["test", "held out"] = Field(
        description="Test images, or training images that it was not trained on."
    )
    config: ClassifierConfig = Field(description="How it was built and trained.")


class ReferenceClassifier:
    """A trained classifier of one kind of images.

    Attributes:
        name: What its features are called beside a figure, such as `mnist-classifier`.
        about: What is recorded with the weights.
        shape: Height, width and channels of an image.
        classes: How many it tells apart.
    """

    def __init__(self, network: Classifier, about: ReferenceMetadata):
        self.network = network.eval().to(memory_format=torch.channels_last)  # as in training
        self.about = about
        self.shape: tuple[int, int, int] | None = about.shape
        self.classes = len(about.classes)
        self.name = f"{about.data}-classifier"

    @classmethod
    def load(cls, name: str) -> "ReferenceClassifier":
        """Read a reference.

        Args:
            name: `mnist` (packaged), or the path of a file that the command above wrote.

        Raises:
            UserError: There is none of that name, or the file is no reference.
        """
        packaged = name in PACKAGED
        path = str(files("cl_ray.evaluation") / f"{name}.safetensors") if packaged else name
        if not Path(path).is_file():
            known = ", ".join((*PACKAGED, STACKED))
            raise UserError(
                f"There is no reference {name}: give {known}, or the path of one that "
                "`python -m cl_ray.evaluation.reference --data DATA --out PATH` wrote."
            )
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = ReferenceMetadata.model_validate_json((file.metadata() or {})[ENTRY])
            with torch.random.fork_rng(devices=[]):  # first weights are drawn, in vain
                network = Classifier(
                    about.shape, len(about.classes), about.config.width, about.config.features
                )
            network.load_state_dict(safetensors.torch.load_file(path))
            return cls(network, about)
        except (OSError, safetensors.SafetensorError, KeyError, ValueError, RuntimeError) as error:
            raise UserError(
                f"{path} is not a reference ({type(error).__name__}: {first_error_line(error)}): write "
                f"it again with `python -m cl_ray.evaluation.reference --data DATA --out {name}`."
            ) from error

    def save(self, path: str) -> None:
        """Write the weights and what is recorded about them; alike byte for byte if they are.

        Raises:
            UserError: It cannot be written there.
        """
        weights = {k: v.contiguous() for k, v in self.network.state_dict().items()}
        blob = safetensors.torch.save(weights, {ENTRY: self.about.model_dump_json()})
        try:
            Path(path).write_bytes(blob)
        except OSError as error:
            raise UserError(f"Cannot write {path}: {error.strerror}.") from error

    def features(self, images: Pixels) -> Floats:
        """The classifier's penultimate layer.

        Args:
            images: uint8 [N, H, W, C], of the shape that it was trained on.

        Returns:
            float32 [N, d], none negative.

        Raises:
            UserError: The images are of another shape or not uint8.
        """
        check_reference_input(images, self.about.shape, f"the reference {self.name}")
        return classifier_outputs(self.network.trunk, images)

    def probabilities(self, features: Floats) -> Floats:
        """Of each class, float32 [N, classes], of what `features` returned."""
        with torch.inference_mode():
            return self.network.head(torch.from_numpy(features)).softmax(1).numpy()

    def predict(self, images: Pixels) -> Floats:
        """Probabilities, float32 [N, classes], of images as `features` takes them."""
        return self.probabilities(self.features(images))

    def labels(self, features: Floats) -> Labels:
        """The likeliest class, [N], of what `features` returned."""
        return self.probabilities(features).argmax(1)


class StackedReference:
    """The packaged classifier of digits, read on each channel of stacked digits.

    So do the papers that measure mode collapse by them (Metz et al., 2017, section 3.3.1; Lin et
    al., 2018). That tells 98.9 % of real triples of test digits rightly.
    """

    name = "mnist-classifier by channel"
    shape: tuple[int, int, int] | None = SHAPE
    classes = STACKED_MODES

    def __init__(self) -> None:
        self.digits = ReferenceClassifier.load("mnist")

    def features(self, images: Pixels) -> Floats:
        """The features of red, green and blue behind one another.

        Args:
            images: uint8 [N, 28, 28, 3].

        Returns:
            float32 [N, 3 d], none negative.

        Raises:
            UserError: The images are of another shape or not uint8.
        """
        check_reference_input(images, SHAPE, f"the reference {STACKED}")
        channels = np.moveaxis(images, 3, 1).reshape(-1, *SHAPE[:2], 1)
        return self.digits.features(channels).reshape(len(images), -1)

    def labels(self, features: Floats) -> Labels:
        """The mode, 0 to 999, of what `features` returned: [N]."""
        channels = features.reshape(3 * len(features), -1)
        return mode_labels(self.digits.labels(channels).reshape(-1, 3))


class InceptionReference:
    """Inception's 2048 features of images of any size, by torchmetrics and torch-fidelity.

    Args:
        weights: Path of the weights, which are not packaged.

    Raises:
        UserError: torch-fidelity or the weights are not there; says where they are from.
    """

    name = "inception-v3"
    shape: tuple[int, int, int] | None = None

    def __init__(self, weights: str):
        if not Path(weights).is_file():
            raise UserError(
                f"Inception's weights are not at {weights or 'a given path'}: download "
                f"{INCEPTION_WEIGHTS} and give `{INCEPTION}:PATH`."
            )
        from torchmetrics.image.fid import NoTrainInceptionV3

        try:
            self.network = NoTrainInceptionV3(self.name + "-compat", ["2048"], weights)
        except ModuleNotFoundError as error:
            raise UserError(
                "Inception's features need torch-fidelity: `pip install torch-fidelity`."
            ) from error
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{weights} does not hold Inception's weights ({first_error_line(error)}): download "
                f"{INCEPTION_WEIGHTS}."
            ) from error

    def features(self, images: Pixels) -> Floats:
        """float32 [N, 2048] of uint8 images [N, H, W, C]."""
        check_reference_input(images, None, self.name)
        colour = torch.from_numpy(images).permute(0, 3, 1, 2)
        colour = colour.expand(-1, 3, -1, -1)
        with torch.inference_mode():
            parts = [self.network(part.contiguous()) for part in colour.split(AT_A_TIME)]
        return torch.cat(parts).numpy()


def load_features(name: str) -> ReferenceClassifier | StackedReference | InceptionReference:
    """A reference by name.

    Args:
        name: As for `Reference.load`; `stacked-mnist`; or `inception:PATH`, with its weights' path.
    """
    if name == STACKED:
        return StackedReference()
    kind, _, weights = name.partition(":")
    return InceptionReference(weights) if kind == INCEPTION else ReferenceClassifier.load(name)


def check_reference_input(images: Pixels, shape: tuple[int, ...] | None, who: str) -> None:
    """Refuse what is not uint8 [N, *shape].

    Raises:
        UserError: Names the shape or the type that was given.
    """
    wanted = f"[N, {', '.join(map(str, shape or ('H', 'W', '1 or 3')))}]"
    fits = images.ndim == 4 and (images.shape[1:] == shape if shape else images.shape[3] in (1, 3))
    if images.dtype != np.uint8 or not fits:
        raise UserError(
            f"{who[0].upper()}{who[1:]} takes uint8 images {wanted}, not {images.dtype} "
            f"{list(images.shape)}: give images like those, or another reference."
        )
    if not len(images):
        raise UserError(f"{who[0].upper()}{who[1:]} was given no image at all.")


class ReferenceCommand(ClassifierConfig):
    """Train a reference classifier on a data set's labels, and write it with its accuracy."""

    data: str = Field("mnist", description="`mnist` or a folder or URI that `cl-ray data` wrote.")
    out: str = Field(description="The safetensors file to write.")
    hold_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Share of the training images to keep out and measure the accuracy on, to "
        "choose settings by. 0 trains on all and measures on the test images.",
    )
    threads: int = Field(1, ge=1, description="CPU threads; another number rounds otherwise.")


def train_reference(command: ReferenceCommand) -> ReferenceClassifier:
    """Train and measure a reference; test images are only looked at once it is trained.

    Raises:
        UserError: The data has no labels, or no images to measure the accuracy on.
    """
    dataset = Dataset.open(command.data)
    info = dataset.info
    train = dataset.read("train")
    if train.label is None:
        raise UserError(f"{command.data} has no labels, which a reference is trained on.")
    classes = info.classes or [str(label) for label in range(int(train.label.max()) + 1)]
    order = np.random.default_rng(command.seed).permutation(len(train.image))
    held, used = np.split(order, [int(command.hold_out * len(order))])
    if len(held):
        images, labels = train.image[held], train.label[held]
    elif "test" in info.splits:
        test = dataset.read("test")
        assert test.label is not None
        images, labels = test.image, test.label
    else:
        raise UserError(
            f"{command.data} has no split test to measure the accuracy on: keep some training "
            "images out, such as --hold-out 0.1."
        )
    begun = time.perf_counter()

    def tell(epoch: int, loss: float) -> None:
        seconds = time.perf_counter() - begun
        print(f"epoch {epoch} of {command.epochs}: loss {loss:.4f}, {seconds:.0f} s", flush=True)

    settings = {name: getattr(command, name) for name in ClassifierConfig.model_fields}
    config = ClassifierConfig(**settings)
    network = train_classifier(train.image[used], train.label[used], len(classes), config, tell)
    about = ReferenceMetadata(
        data=info.name,
        shape=info.shape,
        classes=classes,
        accuracy=0,
        images=len(images),
        measured_on="held out" if len(held) else "test",
        config=config,
    )
    reference = ReferenceClassifier(network, about)
    accuracy = float((reference.predict(images).argmax(1) == labels).mean())
    return ReferenceClassifier(network, about.model_copy(update={"accuracy": accuracy}))


def main(arguments: Sequence[str] | None = None) -> None:
    """The command; a user's mistake ends it with one sentence and status 1."""
    from cl_ray.cli import parse

    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        command = parse(ReferenceCommand, arguments, prog="python -m cl_ray.evaluation.reference")
        folder = Path(command.out).absolute().parent
        if not folder.is_dir():
            raise UserError(f"There is no folder {folder} to write {command.out} to.")
        torch.set_num_threads(command.threads)
        keep_freed_memory()
        reference = train_reference(command)
        reference.save(command.out)
        about = reference.about
        print(f"{command.out}: {about.accuracy:.2%} of {about.images} {about.measured_on} images")
    except UserError as error:
        print(f"reference: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
