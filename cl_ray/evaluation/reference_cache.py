"""The reference classifier of labelled data, trained once and kept."""

import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text

from cl_ray.console import print_line
from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError, first_error_line
from cl_ray.evaluation.classifier import ClassifierConfig, fitting_stride
from cl_ray.evaluation.reference import (
    ReferenceClassifier,
    labelled_held_out,
    train_reference,
)
from cl_ray.evaluation.reference_name import expected_reference, reference_path
from cl_ray.storage import create_folder

_IMAGES, _BYTES = 50_000, 10**9
"""Training images, and the bytes of their pixels, at most."""
_SEEN = 200_000
"""Images seen in training, about: a minute of two cores."""
_MOST_EPOCHS, _STEPS = 60, 16
"""Passes over few images, and steps of a pass, which few images divide into small batches."""
_HOLD_OUT = 0.1
"""Of the training images, where there is no other split."""


def prepare_reference(dataset: Dataset, console: Console) -> None:
    """Have the reference that `evaluation.reference auto` finds beside labelled data.

    Prints its accuracy, or why there is none.
    """
    path, say = reference_path(dataset), partial(print_line, console)
    if path is None or str(path) != expected_reference(dataset):
        return
    with console.status("") as status:
        optional_reference(dataset, [str(path.parent)], lambda s: status.update(Text(s)), say)


def trained_images(dataset: Dataset) -> int:
    """Return how many labelled training images the reference of a dataset is trained on."""
    affordable = _BYTES // math.prod(dataset.info.shape)
    return min(max(dataset.info.labelled_rows("train"), 1), _IMAGES, affordable)


def automatic_config(dataset: Dataset) -> ClassifierConfig:
    """Return the settings by which a reference takes a minute or two, whatever the data."""
    images = trained_images(dataset)
    return ClassifierConfig(
        stride=fitting_stride(dataset.info.shape[0]),
        epochs=min(max(_SEEN // images, 1), _MOST_EPOCHS),
        batch_size=min(max(images // _STEPS, 16), 128),
    )


def cached_reference(
    dataset: Dataset,
    folders: Sequence[str],
    tell: Callable[[str], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
) -> str:
    """Return the path of the dataset's reference; train it if no folder holds it.

    It is kept in the first local folder that can be written, named as by `reference_path`. A lock
    keeps two commands from training it at once. `tell` is called with what takes long, `say` with
    sentences on where the reference is from.

    Raises:
        UserError: It cannot be trained on such data, or kept in no folder.
    """
    config = automatic_config(dataset)
    paths = [Path(folder, f"{dataset.info.fingerprint}.safetensors") for folder in folders]
    for path in paths:
        if _is_kept(path, config, say):
            return str(path)
    for path in paths:
        lock = FileLock(path.with_suffix(".lock"), fallback_to_soft=False)
        try:
            create_folder(path.parent)
            try:
                lock.acquire(timeout=0)
            except Timeout:
                tell("waiting for another command that trains the reference classifier")
                lock.acquire()
        except OSError as error:
            reason = error.strerror or first_error_line(error)
            say(f"The reference cannot be kept in {path.parent}: {reason}.")
            continue
        try:
            if not _is_kept(path, config, say):  # another command may just have trained it
                _train(dataset, config, tell, say).save(str(path))
                say(f"It is kept as {path}.")
            return str(path)
        finally:
            lock.release()
    raise UserError(f"The reference can be kept in none of {', '.join(folders)}: free one of them.")


def optional_reference(
    dataset: Dataset,
    folders: Sequence[str],
    tell: Callable[[str], None],
    say: Callable[[str], None],
) -> str | None:
    """Return what `cached_reference` does; where it fails, say why and return None."""
    try:
        return cached_reference(dataset, folders, tell, say)
    except UserError as error:
        say(f"No reference classifier: {error}")
        return None


def _train(
    dataset: Dataset,
    config: ClassifierConfig,
    tell: Callable[[str], None],
    say: Callable[[str], None],
) -> ReferenceClassifier:
    def on_epoch(epoch: int, loss: float) -> None:
        tell(f"reference classifier: epoch {epoch} of {config.epochs}, loss {loss:.3f}")

    say(
        f"Training a reference classifier on {trained_images(dataset):,} labelled images, once, "
        "to measure samples by."
    )
    tell("reference classifier")
    start = time.perf_counter()
    hold_out = 0.0 if labelled_held_out(dataset) else _HOLD_OUT
    images = trained_images(dataset)
    reference = train_reference(dataset, config, hold_out, images, on_epoch)
    seconds = time.perf_counter() - start
    say(
        f"A reference classifier of the {reference.classes:,} classes was trained on {images:,} "
        f"labelled images in {seconds:.0f} s: {_accuracy(reference)}."
    )
    return reference


def _is_kept(path: Path, config: ClassifierConfig, say: Callable[[str], None]) -> bool:
    """Return whether a file holds the reference, trained by these settings; say which."""
    if not path.is_file():
        return False
    try:
        found = ReferenceClassifier.load(str(path))
    except UserError:
        say(f"The reference {path} is damaged, so it is trained anew.")
        return False
    if found.metadata.config != config:
        say(f"The reference {path} is of another version, so it is trained anew.")
        return False
    say(f"Reference classifier {path}: {_accuracy(found)}.")
    return True


def _accuracy(reference: ReferenceClassifier) -> str:
    found = reference.metadata
    split = "held-out" if found.measured_on == "held out" else found.measured_on
    return f"{found.accuracy:.2%} of {found.images:,} {split} images correct"
