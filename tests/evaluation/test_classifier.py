"""The classifier behind references and classification accuracy: its inputs and its training."""

from typing import Any

import numpy as np
import pytest
import torch
from helpers.datasets import mnist

from cl_ray.errors import UserError
from cl_ray.evaluation.classifier import (
    Classifier,
    ClassifierConfig,
    classifier_outputs,
    fitting_stride,
    train_classifier,
)

SMALL = ClassifierConfig(width=4, features=10)
TINY = ClassifierConfig(width=4, features=16, epochs=4, batch_size=32)


@pytest.fixture(scope="module")
def digits() -> Any:
    return mnist("train", 1001)


def trained_weights(digits: Any, **changes: Any) -> torch.Tensor:
    """Return the weights of a short training with changed settings, as one vector."""
    config = TINY.model_copy(update={"epochs": 2, **changes})
    network = train_classifier(digits[0][:128], digits[1][:128], 10, config)
    return torch.cat([part.flatten().double() for part in network.state_dict().values()])


@pytest.mark.parametrize(
    ("side", "channels", "fitting", "stride"),
    [(16, 1, 2, 2), (29, 1, 2, 2), (32, 3, 2, 2), (45, 3, 4, 4), (64, 1, 4, 2), (128, 3, 8, 8)],
)
def test_every_shape_of_image(side: int, channels: int, fitting: int, stride: int) -> None:
    """The stride that fits leaves small maps, so that images of any size cost about the same."""
    assert fitting_stride(side) == fitting
    config = SMALL.model_copy(update={"stride": stride})
    network = Classifier((side, side, channels), 7, config).eval()
    images = np.random.default_rng(0).integers(0, 256, (3, side, side, channels), np.uint8)
    assert classifier_outputs(network.trunk[:1], images).shape == (3, 4, *[-(-side // stride)] * 2)
    assert classifier_outputs(network.trunk, images).shape == (3, 10)
    found = classifier_outputs(network, images)
    assert found.shape == (3, 7)
    assert found.dtype == np.float32
    assert not np.allclose(found[0], found[1])  # each image has its own


def test_outputs_do_not_depend_on_the_batch(digits: Any) -> None:
    network = Classifier((28, 28, 1), 10, SMALL).eval()
    images = digits[0]
    whole = classifier_outputs(network, images)
    parts = [classifier_outputs(network, images[:3]), classifier_outputs(network, images[3:])]
    assert np.allclose(whole, np.concatenate(parts), atol=1e-5)


def test_digits_are_learned(digits: Any) -> None:
    images, labels = digits
    losses: list[float] = []
    network = train_classifier(
        images[:800], labels[:800], 10, TINY, lambda _, loss: losses.append(loss)
    )
    assert not network.training
    assert len(losses) == TINY.epochs
    assert losses[-1] < losses[0] / 2
    assert (classifier_outputs(network, images[800:]).argmax(1) == labels[800:]).mean() > 0.8


def test_only_the_seed_decides(digits: Any) -> None:
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = trained_weights(digits)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(2)
    assert torch.equal(trained_weights(digits), first)
    assert not torch.equal(trained_weights(digits, seed=1), first)


def test_the_weights_are_averaged(digits: Any) -> None:
    """Averaging over no time at all is the network itself; over long, the middle of its way."""
    last = trained_weights(digits, average=0.0)
    slow = trained_weights(digits, average=0.999)
    start = trained_weights(digits, lr=1e-9)
    assert 0 < (slow - last).norm() < (start - last).norm()


def test_very_few_images(digits: Any) -> None:
    images, labels = digits
    for count in (2, 40):  # less than a batch, and a part of one left over
        network = train_classifier(images[:count], labels[:count], 10, TINY)
        assert np.isfinite(classifier_outputs(network, images[:9])).all()
    with pytest.raises(UserError, match="1 images with 1 labels cannot be trained on"):
        train_classifier(images[:1], labels[:1], 10, TINY)
