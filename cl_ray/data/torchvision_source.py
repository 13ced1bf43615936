"""The data sets that torchvision knows by name → pictures."""

import socket
from collections.abc import Callable, Iterator
from functools import partial
from inspect import Parameter, isclass, signature
from typing import Any

import numpy as np
from PIL import Image

from cl_ray.data.dataset import first_error_line
from cl_ray.data.image_ops import Convert
from cl_ray.data.writer import DatasetMetadata, RawImage, SourceSplits
from cl_ray.errors import UserError

TIMEOUT = 30.0
"""Seconds without an answer after which a download is given up."""


def torchvision_names() -> dict[str, Callable[..., Any]]:
    """Returns torchvision's sets of single images in splits, by name.

    Those are the classes whose constructor needs no more than where the files are and has `train`
    or `split`. EMNIST, which calls something else `split`, appears once for each of its variants.
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
    name: str, kind: Callable[..., Any], root: str, convert: Convert
) -> SourceSplits:
    """Opens one of torchvision's sets, downloading it if it is not there.

    Args:
        name: what it is called.
        kind: its value in `torchvision_names`.
        root: the folder where torchvision keeps its files.
        convert: makes pixels of an image.

    Raises:
        UserError: if it is not under `root` and cannot be downloaded, or is not of single images.
    """
    parameters = signature(kind).parameters
    if "train" in parameters or isinstance(kind, partial):
        choices: dict[str, dict[str, Any]] = {"train": {"train": True}, "test": {"train": False}}
    else:
        whole = parameters["split"].default
        choices = {"train": {"split": whole}, "test": {"split": "test"}}
        if whole == "train":  # and not "trainval", which has it inside
            choices["val"] = {"split": "val"}
    sets = {}
    for split, choice in choices.items():
        opened = _open(name, kind, root, choice)
        if opened is not None:
            sets[split] = opened
    classes = getattr(sets["train"], "classes", None)
    if classes is not None:  # ImageNet has several names for each
        classes = [c if isinstance(c, str) else ", ".join(map(str, c)) for c in classes]
    _, label = _item(sets["train"], 0, f"{name} train 0")
    return (
        {split: _pictures(opened, f"{name} {split}", convert) for split, opened in sets.items()},
        DatasetMetadata(
            name=name,
            source=f"torchvision {name}",
            classes=classes if label is not None else None,
        ),
    )


def _open(name: str, kind: Callable[..., Any], root: str, choice: dict[str, Any]) -> Any:
    """Returns one split, from the disk or else from the network; None if there is no such split."""
    try:
        return kind(root, **choice)
    except (OSError, RuntimeError):
        pass  # not there, or not whole: torchvision says no more
    except ValueError as error:
        if "Unknown value" in str(error) and choice != {"split": "train"}:
            return None
        raise UserError(
            f"{name} under {root} is damaged ({first_error_line(error)}): remove it, to have it "
            "downloaded again."
        ) from error
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs {error.name}: `pip install {error.name}`.") from error
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(TIMEOUT)  # torchvision sets none, and a firewall may never answer
    try:
        return kind(root, **choice, download=True)
    except ModuleNotFoundError as error:
        raise UserError(f"{name} needs {error.name}: `pip install {error.name}`.") from error
    except Exception as error:  # every set has a loader and a server of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")
        raise UserError(
            f"{name} is not whole under {root} and cannot be downloaded ({reason}): put its files "
            "there as torchvision lays them out, or name their folder with `--root`."
        ) from error
    finally:
        socket.setdefaulttimeout(before)


def _item(opened: Any, index: int, where: str) -> tuple[Image.Image, int | None]:
    """Returns an image of a set and its label, if that is a class."""
    try:
        item = opened[index]
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where} cannot be read ({first_error_line(error)}).") from error
    if not (isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], Image.Image)):
        raise UserError(f"{where} is not a single image: give another data set.")
    image, label = item
    return image, int(label) if isinstance(label, int | np.integer) else None


def _pictures(opened: Any, where: str, convert: Convert) -> Iterator[RawImage]:
    for index in range(len(opened)):
        at = f"{where} {index}"
        image, label = _item(opened, index, at)
        yield RawImage(convert(image, at), label, at)
