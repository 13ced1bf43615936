"""Read the images of the datasets that torchvision knows by name."""

import socket
from collections.abc import Callable, Iterator
from functools import partial
from inspect import Parameter, isclass, signature
from typing import Any

import numpy as np
from PIL import Image

from cl_ray.data.conversion import Convert
from cl_ray.data.decoding import BrokenImageError, ImageLimits, limited_pillow
from cl_ray.data.source_config import SourceConfig
from cl_ray.data.writer import DatasetMetadata, RawImage, ReadImage, SourceSplits
from cl_ray.errors import UserError, first_error_line

_TIMEOUT = 30.0
"""Seconds without an answer after which a download fails."""


def torchvision_names() -> dict[str, Callable[..., Any]]:
    """Return the constructors of torchvision's datasets of single images in splits, by name.

    These are the classes whose constructor requires `root` alone and has `train` or `split`.
    EMNIST, whose `split` is something else, appears once for each of its variants.
    """
    from torchvision import datasets

    found: dict[str, Callable[..., Any]] = {}
    for name in datasets.__all__:
        kind = getattr(datasets, name)
        # Modules with an underscore hold pairs of images: stereo and optical flow.
        if not isclass(kind) or kind.__module__.startswith("torchvision.datasets._"):
            continue
        parameters = dict(signature(kind).parameters)
        needed = {
            key
            for key, parameter in parameters.items()
            if parameter.default is Parameter.empty and parameter.kind is not Parameter.VAR_KEYWORD
        }
        default = parameters["split"].default if "split" in parameters else None
        if needed == {"root"} and ("train" in parameters or default in ("train", "trainval")):
            found[name] = kind
        elif name == "EMNIST":
            for variant in datasets.EMNIST.splits:
                found[f"EMNIST-{variant}"] = partial(datasets.EMNIST, split=variant)
    return found


def read_torchvision(
    name: str, kind: Callable[..., Any], config: SourceConfig, convert: Convert
) -> SourceSplits:
    """Open a dataset of `torchvision_names`; download it if it is not there.

    Raises:
        UserError: It is not under `root` and cannot be downloaded, or is not of single images.
    """
    parameters = signature(kind).parameters
    if "train" in parameters or isinstance(kind, partial):
        choices: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    else:
        whole = parameters["split"].default
        choices = {"train": {"split": whole}, "test": {"split": "test"}}
        if whole == "train":  # "trainval" includes it
            choices["validation"] = {"split": "val"}
    found = {split: _open(name, kind, config.root, choice) for split, choice in choices.items()}
    sets = {split: opened for split, opened in found.items() if opened is not None}
    classes = getattr(sets["train"], "classes", None)
    if classes is not None:  # ImageNet has several names for each
        classes = [c if isinstance(c, str) else ", ".join(map(str, c)) for c in classes]
    _, label = _read_item(sets["train"], 0, f"{name} train 0", config.limits)
    return (
        {
            split: _images(opened, f"{name} {split}", convert, config.limits)
            for split, opened in sets.items()
        },
        DatasetMetadata(
            name=name,
            source=f"torchvision {name}",
            classes=classes if label is not None else None,
        ),
    )


def _open(name: str, kind: Callable[..., Any], root: str, choice: dict[str, Any]) -> Any:
    """Open one split, from the disk or else from the network; None if there is no such split."""
    try:
        return kind(root, **choice)
    except (OSError, RuntimeError):
        pass  # missing or incomplete: torchvision does not distinguish
    except ValueError as error:
        if "Unknown value" in str(error) and choice != {"split": "train"}:
            return None
        raise UserError(
            f"{name} under {root} is damaged ({first_error_line(error)}): remove it, and it is "
            "downloaded again."
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs {error.name}: `pip install {error.name}`.") from error
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_TIMEOUT)  # torchvision sets none; a firewall may never answer
    try:
        return kind(root, **choice, download=True)
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs {error.name}: `pip install {error.name}`.") from error
    except Exception as error:  # every dataset has its own loader and server
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
        raise UserError(
            f"{name} is not complete under {root} and cannot be downloaded ({reason}): put its "
            "files there as torchvision lays them out, or name their folder with `--root`."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _read_item(
    opened: Any, index: int, name: str, limits: ImageLimits
) -> tuple[Image.Image, int | None]:
    """Return an image of a dataset and its label, if that is a class."""
    with limited_pillow(name, limits):
        item = opened[index]
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Image.Image)):
        raise UserError(f"{name} is not a single image: give another dataset.")
    image, label = item
    return image, int(label) if isinstance(label, int | np.integer) else None


def _images(opened: Any, split: str, convert: Convert, limits: ImageLimits) -> Iterator[ReadImage]:
    for index in range(len(opened)):
        name = f"{split} {index}"
        try:
            image, label = _read_item(opened, index, name, limits)
            limits.check(*image.size, name)
            yield RawImage(convert(image, name), label, name)
        except BrokenImageError as error:
            yield error
