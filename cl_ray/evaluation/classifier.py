"""A small image classifier and its training, independent of the networks that it evaluates."""

import copy
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor, nn

from cl_ray.base_config import BaseConfig
from cl_ray.data.config import ViewConfig
from cl_ray.data.views import apply_views, sample_views
from cl_ray.errors import UserError
from cl_ray.networks.normalize import to_unit

FORWARD_BATCH = 500
"""Images in one forward pass without training."""
_SMALLEST_MAP, _LARGEST_MAP = 4, 16
"""Feature maps are halved until no side is longer than the first; `fitting_stride` makes no first
one longer than the second."""

Pixels = NDArray[np.uint8]
Labels = NDArray[np.int64]
Floats = NDArray[np.float32]


class ClassifierConfig(BaseConfig):
    """Architecture and training of a classifier."""

    width: int = Field(32, ge=4, le=256, description="Channels of the first feature maps.")
    features: int = Field(128, ge=2, le=128, description="Dimensions of the features.")
    stride: int = Field(2, ge=2, le=32, description="Stride of the first convolution.")
    epochs: int = Field(15, ge=1, description="Passes over the images.")
    batch_size: int = Field(128, ge=2, description="Images per step.")
    lr: float = Field(0.1, gt=0, description="Peak learning rate; cosine decay to 0.")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty of all weights.")
    average: float = Field(0.998, ge=0, lt=1, description="Decay per step of the EMA weights.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of weights, order and views.")
    views: ViewConfig = Field(
        ViewConfig(rotate=10, shift=0.08, scale=0.1, shear=10, warp=0.05, erase=0),
        description="Augmentation of the training images.",
    )


class Classifier(nn.Module):
    """Strided convolutions, a linear layer to the features, and one from them to the classes.

    Args:
        shape: Height, width and channels of an image.
        classes: Number of classes.
        config: Architecture: feature maps after the first ones have twice their channels, and the
            kernel of the first convolution is one pixel wider than two strides.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int, config: ClassifierConfig):
        super().__init__()
        width, features, stride = config.width, config.features, config.stride
        side, channels = -(-shape[0] // stride), width
        first = _convolution(shape[2], width, 2 * stride + 1, stride)
        layers = [*first, *_convolution(width, width)]
        while side > _SMALLEST_MAP:
            layers += _convolution(channels, 2 * width, stride=2)
            side, channels = (side + 1) // 2, 2 * width
            if side > _SMALLEST_MAP:
                layers += _convolution(channels, channels)
        layers += [nn.Flatten(), nn.Linear(channels * side**2, features, bias=False)]
        self.trunk = nn.Sequential(*layers, nn.BatchNorm1d(features), nn.ReLU(inplace=True))
        self.head = nn.Linear(features, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits [B, classes] of images [B, C, H, W] in [-1, 1]."""
        return self.head(self.trunk(images))


def _convolution(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """Build a convolution, batch norm and ReLU."""
    return [
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    ]


def fitting_stride(side: int) -> int:
    """Return the first stride, a power of 2, by which images of any size cost about the same."""
    stride = 2
    while -(-side // stride) > _LARGEST_MAP:
        stride *= 2
    return stride


def classifier_outputs(network: nn.Module, images: Pixels) -> Floats:
    """Compute the outputs, float32 [N, ...], of a network or its trunk for images [N, H, W, C]."""
    with torch.inference_mode():
        parts = [
            network(to_unit(torch.from_numpy(images[start : start + FORWARD_BATCH])))
            for start in range(0, len(images), FORWARD_BATCH)
        ]
    return torch.cat(parts).numpy()


def train_classifier(
    images: Pixels,
    labels: Labels,
    classes: int,
    config: ClassifierConfig,
    on_epoch: Callable[[int, float], None] | None = None,
) -> Classifier:
    """Train on augmented images by SGD with Nesterov momentum and a cosine learning rate.

    The same arguments and thread count give the same weights on the same processor.

    Args:
        images: uint8 [N, H, W, C].
        labels: int64 [N], in [0, classes).
        classes: Number of classes.
        config: Architecture and training.
        on_epoch: Called after each epoch with its number, from 1, and its mean loss.

    Returns:
        The network with EMA weights and batch norm statistics, in evaluation mode, on the CPU.

    Raises:
        UserError: There are fewer than two images.
    """
    if len(images) < 2:
        raise UserError(f"{len(images)} images with {len(labels)} labels cannot be trained on.")
    shape: tuple[int, int, int] = images.shape[1:]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = Classifier(shape, classes, config)
    network = network.to(memory_format=torch.channels_last)
    ema = copy.deepcopy(network)
    averaged, current = (
        [tensor for tensor in one.state_dict().values() if tensor.is_floating_point()]
        for one in (ema, network)
    )
    optimizer = torch.optim.SGD(
        network.parameters(), config.lr, 0.9, weight_decay=config.weight_decay, nesterov=True
    )
    batch = min(config.batch_size, len(images))
    steps = len(images) // batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=steps * config.epochs, cycle_momentum=False, pct_start=0.2
    )
    random = torch.Generator().manual_seed(config.seed)
    pixels, targets = torch.from_numpy(images), torch.from_numpy(labels)
    for epoch in range(config.epochs):
        total = 0.0
        order = torch.randperm(len(images), generator=random)[: steps * batch].view(steps, batch)
        for step, rows in enumerate(order):
            views = apply_views(to_unit(pixels[rows]), sample_views(config.views, batch, random))
            loss = nn.functional.cross_entropy(network(views), targets[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            done = epoch * steps + step
            decay = min(config.average, (1 + done) / (10 + done))  # forget the first steps
            torch._foreach_lerp_(averaged, current, 1 - decay)
            total += loss.item()
        if on_epoch:
            on_epoch(epoch + 1, total / steps)
    return ema.eval()
