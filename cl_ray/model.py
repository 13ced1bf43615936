"""A trained run in Python: `cl_ray.load("runs/demo")`. Free of Ray."""

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_ray.checkpoint import PRIOR_FILE, WEIGHTS, CheckpointStore
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.device import select_device
from cl_ray.errors import UserError
from cl_ray.networks.build import build_networks
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator
from cl_ray.networks.normalize import to_uint8, to_unit
from cl_ray.prior import Prior
from cl_ray.rng import BLOCK, indexed_samples, seeded_generator
from cl_ray.storage import RunStorage

Images = Tensor | NDArray[np.uint8]

EVENLY = "This checkpoint does not say how many images each class has: all are drawn alike often."

UNPLACED = "This checkpoint has no density of latent vectors: samples are of the noise of training."


@dataclass(frozen=True)
class TrainedModel:
    """The EMA generator and D of one checkpoint.

    Args:
        config: What the run was trained with.
        shape: Height, width and channels of its images.
        checkpoint: The checkpoint's name.
        step: Steps that it was trained for.
        generator: The EMA generator.
        discriminator: D.
        device: Where they compute.
        classes: The names of its classes, if it was trained with `condition`; else none.
        counts: How many training images each class has; none if the checkpoint does not say.
        prior: What samples are drawn from; None is the noise of training.
    """

    config: Config
    shape: tuple[int, int, int]
    checkpoint: str
    step: int
    generator: Generator
    discriminator: Discriminator
    device: torch.device
    classes: tuple[str, ...] = ()
    counts: tuple[int, ...] = ()
    prior: Prior | None = None

    def noise(self, n: int, seed: int = 0, start: int = 0) -> Tensor:
        """Unit noise [n, latent] number `start` on, a pure function of seed and number."""
        latent = self.config.generator.latent
        return indexed_samples(
            lambda block: torch.randn(BLOCK, latent, generator=seeded_generator(seed, block)),
            n,
            start,
        )

    def latents(
        self, n: int, seed: int = 0, start: int = 0, kinds: NDArray[np.int64] | None = None
    ) -> Tensor:
        """Latent vectors [n, latent] of samples number `start` on: noise, put where images lie.

        Of a run with classes, where images of the classes `kinds` [n] lie. Without the `prior`
        that the config asks for, noise as it is, with a warning.
        """
        noise = self.noise(n, seed, start)
        if self.prior is None:
            if self.config.generator.prior:
                warnings.warn(UNPLACED, stacklevel=2)
            return noise
        chance = indexed_samples(
            lambda block: torch.rand(BLOCK, generator=seeded_generator(seed, block, 2)), n, start
        )
        return self.prior.place(noise, chance, None if kinds is None else torch.from_numpy(kinds))

    def sample_labels(
        self, n: int, seed: int = 0, start: int = 0, label: int | str | None = None
    ) -> NDArray[np.int64] | None:
        """The classes of images [n] number `start` on that a seed gives.

        They come as often as among the training images, to one image of each BLOCK (systematic
        sampling: Madow, 1949); if their `counts` are not known, all alike often, with a
        warning.

        Args:
            n: How many.
            seed: Everything random follows from it.
            start: The first one's number.
            label: A class's name or number, to have only that; None is any.

        Returns:
            Numbers of classes [n]; None if the run knows none.

        Raises:
            UserError: There is no such class, or no training image of it.
        """
        if label is not None:
            return np.full(n, self.class_number(label))
        if not self.classes:
            return None
        if not self.counts:
            warnings.warn(EVENLY, stacklevel=2)
        counts = torch.tensor(self.counts or [1] * len(self.classes))
        return indexed_samples(
            lambda block: _spread(counts, seeded_generator(seed, block, 1)), n, start
        ).numpy()

    def class_number(self, label: int | str) -> int:
        """The number of a class that is given by name or number.

        Raises:
            UserError: The run was trained without classes, has none of that name or number, or
                was given no training image of it.
        """
        if not self.classes:
            raise UserError(
                f"class {label} cannot be asked for: this run was trained without classes. "
                "Train one with --condition projection on labelled data."
            )
        if isinstance(label, str) and label in self.classes:
            number = self.classes.index(label)
        elif str(label).isdecimal() and int(label) < len(self.classes):
            number = int(label)
        else:
            raise UserError(f"class {label!r} is unknown; the run has: {_shortly(self.classes)}.")
        if self.counts and not self.counts[number]:
            known = [name for name, n in zip(self.classes, self.counts, strict=True) if n]
            raise UserError(
                f"class {label!r} had no training image, so G never learnt it; there were images "
                f"of: {_shortly(known)}."
            )
        return number

    def generate(
        self,
        n: int,
        seed: int = 0,
        start: int = 0,
        truncation: float = 1.0,
        label: int | str | None = None,
    ) -> NDArray[np.uint8]:
        """Images [n, H, W, C] of noise, number `start` on of those that the seed gives.

        Args:
            n: How many.
            seed: Everything random follows from it.
            start: The first one's number.
            truncation: 0 to 1: less pulls the styles of a style-based G to their mean, for
                images that are less varied and safer (Karras et al., 2018, appendix B).
            label: The name or number of the class that all are to be of; None is `kinds`.

        Raises:
            UserError: n is below 1, G knows no truncation, there is no such class, or no training
                image of it.
        """
        if n < 1:
            raise UserError(f"n {n} must be 1 or more images.")
        self.check_truncation(truncation)
        kinds = self.sample_labels(n, seed, start, label)
        return self.decode(self.latents(n, seed, start, kinds), truncation, kinds)

    def check_truncation(self, truncation: float) -> None:
        """See that images can be truncated so.

        Raises:
            UserError: They cannot.
        """
        family = self.config.generator.family
        if not 0 <= truncation <= 1:
            raise UserError(f"truncation {truncation} must be 0 to 1.")
        if truncation < 1 and family != "style":
            raise UserError(
                f"truncation {truncation} is for a style-based generator, and this run's is "
                f"{family!r}: leave it out, or train with --generator.family style."
            )

    @torch.no_grad()
    def decode(
        self,
        latents: Tensor,
        truncation: float = 1.0,
        labels: NDArray[np.int64] | None = None,
    ) -> NDArray[np.uint8]:
        """Images [n, H, W, C] of latent vectors [n, latent]; for `truncation` see `generate`.

        Args:
            latents: What to decode.
            truncation: Of a style-based G.
            labels: Numbers of the images' classes [n], which a run with classes needs.

        Raises:
            UserError: Labels are given that the run does not know, or not given that it needs.
        """
        kinds = self._kinds(labels, len(latents), needed=bool(self.classes))
        parts = [
            to_uint8(self.generator.decode(z.to(self.device), truncation=truncation, labels=kind))
            for z, kind in zip(latents.split(BLOCK), kinds, strict=True)
        ]
        return torch.cat(parts).cpu().numpy()

    @torch.no_grad()
    def encode(self, images: Images) -> Tensor:
        """Latent vectors [n, latent] of images [n, H, W] or [n, H, W, C], mean square 1."""
        return torch.cat([self.generator.encode(x).cpu() for x in self._blocks(images)])

    def reconstruct(
        self, images: Images, labels: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint8]:
        """G(x) [n, H, W, C] of images [n, H, W] or [n, H, W, C].

        Where the run knows classes, as ones of `labels` [n], or of what D takes them for.

        Raises:
            UserError: The run's D names no classes (condition `projection`), and no labels are
                given; or they do not fit.
        """
        if self.classes and labels is None:
            labels = self.classify(images)
        return self.decode(self.encode(images), labels=labels)

    @torch.no_grad()
    def classify(self, images: Images) -> NDArray[np.int64]:
        """The numbers of the classes [n] that D takes images [n, H, W] or [n, H, W, C] for.

        Raises:
            UserError: The run's D names no classes.
        """
        d = self.discriminator
        if not self.classes or d.projects:
            raise UserError(
                f"This run's D names no classes (condition {self.config.condition}): give the "
                "labels, or train with --condition classifier."
            )
        parts = [d.classify(d.features(x)).argmax(1).cpu() for x in self._blocks(images)]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def embed(self, images: Images) -> NDArray[np.float32]:
        """D's representation, float32 [n, d], of images [n, H, W] or [n, H, W, C].

        See `Discriminator.represent` for what it is made of.
        """
        parts = [self.discriminator.representation(x).cpu() for x in self._blocks(images)]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def score(self, images: Images, labels: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """D's scores, float32 [n], high for real, of images [n, H, W] or [n, H, W, C].

        With the condition `projection`, as ones of `labels` [n], which it then needs.

        Raises:
            UserError: Images or labels do not fit.
        """
        blocks, d = self._blocks(images), self.discriminator
        kinds = self._kinds(labels, len(images), needed=d.projects)
        parts = [d(x, kind)[0].cpu() for x, kind in zip(blocks, kinds, strict=True)]
        return torch.cat(parts).numpy()

    def _kinds(
        self, labels: NDArray[np.int64] | None, count: int, needed: bool
    ) -> Sequence[Tensor | None]:
        """Numbers of classes [count] by blocks; None for each block where they are not needed."""
        if labels is None and not needed:
            return [None] * -(-count // BLOCK)
        if not self.classes:
            raise UserError("labels are of no use: this run was trained without classes.")
        if labels is None or len(labels) != count:
            raise UserError(
                f"This run knows classes: give {count} labels, one an image, "
                f"not {'none' if labels is None else len(labels)}."
            )
        numbers = torch.as_tensor(labels, dtype=torch.int64)
        if numbers.min() < 0 or numbers.max() >= len(self.classes):
            raise UserError(
                f"labels are {numbers.min()} to {numbers.max()}; this run's classes are 0 to "
                f"{len(self.classes) - 1}."
            )
        blocks = numbers.to(self.device).split(BLOCK)
        return blocks if needed else [None] * len(blocks)

    def check_classes(self, dataset: Dataset) -> None:
        """See that labels of a data set, if it has any, are this run's classes.

        Raises:
            UserError: They are others.
        """
        if not self.classes or not dataset.info.labelled:
            return
        there = tuple(dataset.class_names())
        if there != self.classes:
            raise UserError(
                f"The classes of {dataset.location} ({_shortly(there)}) are not those that this "
                f"run was trained with ({_shortly(self.classes)}): give data of the same classes."
            )

    def _blocks(self, images: Images) -> list[Tensor]:
        images = torch.as_tensor(images)
        if images.ndim == 3:
            images = images[..., None]
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != self.shape:
            raise UserError(
                f"images are {images.dtype} {list(images.shape)}; this run takes uint8 "
                f"{['n', *self.shape]}, 0 to 255."
            )
        if not len(images):
            raise UserError("images is empty: give one or more.")
        return [to_unit(x.to(self.device)) for x in images.split(BLOCK)]


def load(where: str | Path, checkpoint: str = "last", device: str = "auto") -> TrainedModel:
    """The networks of a run.

    Args:
        where: The run folder's path or URI.
        checkpoint: `last`, `best` (by the run's `checkpoint.metric`) or a checkpoint's name.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        UserError: There is no such device or run, no checkpoint yet, another version's run, a
            damaged file, or weights that are no numbers.
    """
    place = select_device(device)
    folder = RunStorage.of_run(where)
    checkpoints = CheckpointStore(*folder.open())
    known = {"last": checkpoints.newest, "best": checkpoints.best}
    manifest = known[checkpoint]() if checkpoint in known else None
    if manifest is None and checkpoint in known:
        missing = "no checkpoint yet" if checkpoint == "last" else "no best checkpoint yet"
        raise UserError(f"{folder} has {missing}: train it further.")
    chosen = manifest.name if manifest else checkpoint
    blobs = checkpoints.networks(chosen)
    about = read_metadata(blobs[WEIGHTS["ema_generator"]])
    config = Config.from_yaml(about["config"], f"{folder}, checkpoint {chosen}")
    height, width, channels = about["shape"]
    shape = (height, width, channels)
    layout: dict[str, Any] = {"device": place, "memory_format": torch.channels_last}
    classes = tuple(about.get("classes", ()))  # which no run had before there was `condition`
    counts = tuple(about.get("counts", ()))  # which came later still
    generator, discriminator = build_networks(config, shape, len(classes))
    for network, part in ((generator, "ema_generator"), (discriminator, "discriminator")):
        weights = safetensors.torch.load(blobs[WEIGHTS[part]])
        for key, weight in weights.items():
            if not weight.isfinite().all():
                raise UserError(
                    f"{folder}, checkpoint {chosen}: the weights {key} in {WEIGHTS[part]} are not "
                    "all numbers: take an earlier checkpoint."
                )
        network.load_state_dict(weights)
        network.to(**layout).requires_grad_(False).eval()
    return TrainedModel(
        config=config,
        shape=shape,
        checkpoint=chosen,
        step=about["step"],
        generator=generator,
        discriminator=discriminator,
        device=place,
        classes=classes,
        counts=counts,
        prior=Prior(**safetensors.torch.load(blobs[PRIOR_FILE])) if PRIOR_FILE in blobs else None,
    )


def _spread(counts: Tensor, random: torch.Generator) -> Tensor:
    """Classes of BLOCK images, each as often as its count's share, to one image, in any order."""
    order = torch.randperm(len(counts), generator=random)
    edges = counts[order].cumsum(0)
    # Points in equal distances, from a random one on: a class without images is never met.
    steps = torch.arange(BLOCK) + torch.rand((), generator=random, dtype=torch.float64)
    places = torch.searchsorted(edges.double(), steps / BLOCK * edges[-1], right=True)
    return order[places[torch.randperm(BLOCK, generator=random)]]


def _shortly(names: Sequence[str]) -> str:
    """The first names, if there are many."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")


def read_metadata(blob: bytes) -> dict[str, Any]:
    """What a safetensors file says of itself: a length, then a header in JSON, come first."""
    length = int.from_bytes(blob[:8], "little")
    header = json.loads(blob[8 : 8 + length])
    return dict(json.loads(header["__metadata__"]["cl_ray"]))
