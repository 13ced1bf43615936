"""A trained model in Python: `cl_ray.load("runs/demo")`. Free of Ray."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from cl_ray.checkpoint import PRIOR_FILE, WEIGHTS, CheckpointStore, read_metadata
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.device import select_device
from cl_ray.errors import UserError
from cl_ray.networks.build import build_networks
from cl_ray.networks.discriminator import Discriminator
from cl_ray.networks.generator import Generator
from cl_ray.networks.normalize import to_uint8, to_unit
from cl_ray.novelty import Novelty, NoveltyDetector, sample_known
from cl_ray.prior import Prior
from cl_ray.rng import BLOCK, indexed_samples, seeded_generator
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer

Images = Tensor | NDArray[np.uint8]

NO_PRIOR = (
    "This checkpoint has no fitted prior: latent vectors are drawn from the training prior instead."
)


@dataclass(frozen=True)
class TrainedModel:
    """The EMA generator and the discriminator of one checkpoint.

    Build it with `load` (a run folder), `from_weights` (state dicts) or `from_trainer` (a live
    trainer).

    Args:
        config: Config of the run.
        shape: Height, width and channels of an image.
        checkpoint: Name of the checkpoint.
        step: Training steps taken.
        generator: The EMA generator.
        discriminator: The discriminator D.
        device: Where the networks compute.
        classes: Names of the classes; empty unless the run was trained with `condition`.
        counts: Number of training images of each class; as long as `classes`.
        predicted_labels: How labels of the training images were predicted; empty if none were.
        prior: The fitted prior; None draws latent vectors from the training prior, unit noise.
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
    predicted_labels: str = ""
    prior: Prior | None = None

    @property
    def supervision(self) -> str:
        """Which labels the training used, and whether they were predicted; empty for none."""
        predicted = [self.predicted_labels] if self.predicted_labels else []
        return ", ".join([self.config.supervision, *predicted]) if self.config.supervision else ""

    @classmethod
    def from_weights(
        cls,
        config: Config,
        shape: tuple[int, int, int],
        generator: Mapping[str, Tensor],
        discriminator: Mapping[str, Tensor],
        *,
        device: torch.device | str = "cpu",
        **fields: Any,
    ) -> "TrainedModel":
        """Build the networks and load their state dicts; draws no random numbers of the caller's.

        The other arguments are fields of `TrainedModel`.
        """
        with torch.random.fork_rng(devices=[]):  # the initial weights are overwritten
            networks = build_networks(config, shape, len(fields.get("classes", ())))
        layout: dict[str, Any] = {"device": device, "memory_format": torch.channels_last}
        for network, weights in zip(networks, (generator, discriminator), strict=True):
            network.load_state_dict(weights)
            network.to(**layout).requires_grad_(False).eval()
        g, d = networks
        where = torch.device(device)
        return cls(config=config, shape=shape, generator=g, discriminator=d, device=where, **fields)

    @classmethod
    def from_trainer(cls, trainer: Trainer) -> "TrainedModel":
        """Wrap the networks of a live trainer, without copying them.

        D stays in training mode: call `eval()` on it while spectral norm must not be updated. The
        trainer's config may be a `Config` or only a `TrainerConfig`.
        """
        gan, config = trainer.gan, trainer.config
        if not isinstance(config, Config):
            config = Config.model_validate(config.model_dump())
        return cls(
            config=config,
            shape=gan.shape,
            checkpoint=f"step-{gan.steps:08d}",
            step=gan.steps,
            generator=gan.ema_generator,
            discriminator=gan.discriminator,
            device=gan.device,
            classes=gan.classes,
            counts=tuple(trainer.loader.partition.counts),
            predicted_labels=trainer.loader.partition.dataset.info.predicted_labels,
            prior=trainer.prior,
        )

    def to(self, device: torch.device | str) -> "TrainedModel":
        """Move the networks to a device, as `torch.nn.Module.to` does, and return the model."""
        device = torch.device(device)
        networks = self.generator.to(device), self.discriminator.to(device)
        return replace(self, device=device, generator=networks[0], discriminator=networks[1])

    def noise(self, n: int, seed: int = 0, start: int = 0) -> Tensor:
        """Draw rows start to start + n of the unit noise of a seed: float32 [n, latent].

        Raises:
            UserError: The seed or the start is negative.
        """
        _check_seed(seed, start)
        shape = BLOCK, self.config.generator.latent
        return indexed_samples(
            lambda block: torch.randn(shape, generator=seeded_generator(seed, block)), n, start
        )

    def latents(
        self, n: int, seed: int = 0, start: int = 0, labels: NDArray[np.int64] | None = None
    ) -> Tensor:
        """Draw rows start to start + n of the latent vectors of a seed: float32 [n, latent].

        They are drawn from the fitted prior; with `labels` [n], from that of each label's
        class. Without a fitted prior they are unit noise, with a warning if the config asks for
        one.
        """
        noise = self.noise(n, seed, start)
        if self.prior is None:
            if self.config.generator.prior_codes:
                warnings.warn(NO_PRIOR, stacklevel=2)
            return noise
        uniform = indexed_samples(
            lambda block: torch.rand(BLOCK, generator=seeded_generator(seed, block, 2)), n, start
        )
        classes = None if labels is None else torch.from_numpy(labels)
        return self.prior.transform_noise(noise, uniform, classes)

    def sample_labels(
        self, n: int, seed: int = 0, start: int = 0, label: int | str | None = None
    ) -> NDArray[np.int64] | None:
        """Draw rows start to start + n of the labels of a seed.

        Each class is as frequent as among the training images that keep their label, to within one
        image of each BLOCK (systematic sampling: Madow, 1949); `labels.count` keeps as many of
        each. With `label`, a name or an index, all are of that class.

        Returns:
            Class indices [n]; None if the run was trained without classes.

        Raises:
            UserError: The class does not exist or had no training image.
        """
        _check_seed(seed, start)
        if label is not None:
            return np.full(n, self.class_index(label))
        if not self.classes:
            return None
        counts = torch.tensor(self.counts)
        return indexed_samples(
            lambda block: _systematic_sample(counts, seeded_generator(seed, block, 1)), n, start
        ).numpy()

    def class_index(self, label: int | str) -> int:
        """Return the index of a class given by name or index.

        Raises:
            UserError: The run was trained without classes, the class does not exist, or it had no
                training image.
        """
        if not self.classes:
            raise UserError(
                f"class {label} cannot be generated: this run was trained without classes. "
                "Train one with --condition projection on labelled data."
            )
        if isinstance(label, str) and label in self.classes:
            index = self.classes.index(label)
        elif str(label).isdecimal() and int(label) < len(self.classes):
            index = int(label)
        else:
            raise UserError(f"class {label!r} is unknown; the run has: {_joined(self.classes)}.")
        if not self.counts[index]:
            trained = [name for name, n in zip(self.classes, self.counts, strict=True) if n]
            raise UserError(
                f"class {label!r} had no training image, so G never learned it; the classes with "
                f"training images are: {_joined(trained)}."
            )
        return index

    def generate(
        self,
        n: int,
        seed: int = 0,
        start: int = 0,
        truncation: float = 1.0,
        label: int | str | None = None,
    ) -> NDArray[np.uint8]:
        """Generate images start to start + n of a seed: uint8 [n, H, W, C].

        Args:
            n: Number of images, 1 or more.
            seed: Seed of all random numbers.
            start: Index of the first image.
            truncation: 0 to 1. Below 1 moves the styles of a style-based G towards their mean:
                less variety, fewer bad images (Karras et al., 2018, appendix B).
            label: Name or index of the class of all images; None draws one for each image, see
                `sample_labels`.

        Raises:
            UserError: n is below 1, the seed or the start is negative, G supports no truncation,
                or the class does not exist or had no training image.
        """
        if n < 1:
            raise UserError(f"n {n} must be 1 or more images.")
        self.check_truncation(truncation)
        labels = self.sample_labels(n, seed, start, label)
        return self.decode(self.latents(n, seed, start, labels), truncation, labels)

    def check_truncation(self, truncation: float) -> None:
        """Check that the generator supports a truncation.

        Raises:
            UserError: It is out of range, or below 1 for a family without styles.
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
        latents: Tensor | NDArray[np.float32],
        truncation: float = 1.0,
        labels: NDArray[np.int64] | None = None,
    ) -> NDArray[np.uint8]:
        """Decode latent vectors, float32 [n, latent], to images, uint8 [n, H, W, C].

        A run with classes needs `labels`, class indices [n]. For the truncation see `generate`.

        Raises:
            UserError: The latent vectors or the truncation do not fit, or labels are missing, or
                given to a run without classes.
        """
        self.check_truncation(truncation)
        latents, width = torch.as_tensor(latents), self.config.generator.latent
        if latents.ndim != 2 or latents.shape[1] != width or not len(latents):
            raise UserError(f"latents are {list(latents.shape)}; this run takes [n, {width}].")
        blocks = self._label_blocks(labels, len(latents), needed=bool(self.classes))
        parts = [
            to_uint8(self.generator.decode(z, truncation=truncation, labels=y))
            for z, y in zip(latents.to(self.device, self._dtype).split(BLOCK), blocks, strict=True)
        ]
        return torch.cat(parts).cpu().numpy()

    @torch.no_grad()
    def encode(self, images: Images) -> Tensor:
        """Encode images [n, H, W] or [n, H, W, C] to latent vectors [n, latent], mean square 1."""
        parts = [self.generator.encode(x).float().cpu() for x in self._image_blocks(images)]
        return torch.cat(parts)

    def reconstruct(
        self, images: Images, labels: NDArray[np.int64] | None = None
    ) -> NDArray[np.uint8]:
        """Compute G(x), uint8 [n, H, W, C], of uint8 images [n, H, W] or [n, H, W, C].

        A run with classes decodes by `labels`, class indices [n]; None takes D's predictions.

        Raises:
            UserError: The labels do not fit, or are missing and D predicts none (condition
                `projection`).
        """
        if self.classes and labels is None:
            labels = self.classify(images)
        return self.decode(self.encode(images), labels=labels)

    @torch.no_grad()
    def classify(self, images: Images) -> NDArray[np.int64]:
        """Predict class indices [n] of images [n, H, W] or [n, H, W, C] with D's classifier.

        Raises:
            UserError: D has no classifier.
        """
        d = self.discriminator
        if not self.classes or d.is_projection:
            raise UserError(
                f"This run's D predicts no classes (condition {self.config.condition}): give the "
                "labels, or train with --condition classifier."
            )
        parts = [d.classify(d.features(x)).argmax(1).cpu() for x in self._image_blocks(images)]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def embed(self, images: Images) -> NDArray[np.float32]:
        """Compute D's representation, float32 [n, d], of images [n, H, W] or [n, H, W, C].

        See `Discriminator.representation`.
        """
        d = self.discriminator
        parts = [d.representation(x).float().cpu() for x in self._image_blocks(images)]
        return torch.cat(parts).numpy()

    @torch.no_grad()
    def score(self, images: Images, labels: NDArray[np.int64] | None = None) -> NDArray[np.float32]:
        """Compute D's scores, float32 [n], higher for real, of uint8 [n, H, W] or [n, H, W, C].

        The condition `projection` needs `labels`, class indices [n].

        Raises:
            UserError: The images or labels do not fit.
        """
        blocks, d = self._image_blocks(images), self.discriminator
        labels_by_block = self._label_blocks(labels, len(images), needed=d.is_projection)
        parts = [d(x, y).score.float().cpu() for x, y in zip(blocks, labels_by_block, strict=True)]
        return torch.cat(parts).numpy()

    def novelty(self, images: Images, known: Dataset | None = None) -> Novelty:
        """Compute how unlike the training images each image is; see `cl_ray.novelty`.

        Args:
            images: uint8 [n, H, W] or [n, H, W, C].
            known: The dataset that the run was trained on; None opens the one that its config
                names. The first call with a dataset embeds up to 15,000 of its images.

        Returns:
            `novelty` [n], the fraction of held-out images that are less novel, and `distance` [n].

        Raises:
            UserError: The dataset cannot be read, or has images of another shape.
        """
        features = self._novelty_features(images)
        known = known or Dataset.open(self.config.data)
        key = known.info.fingerprint
        if key not in self._novelty_detectors:
            self.check_shape(known)
            train, held_out = (self._novelty_features(x.image) for x in sample_known(known))
            self._novelty_detectors[key] = NoveltyDetector(train, held_out, self.device)
        return self._novelty_detectors[key].score(features)

    def _novelty_features(self, images: Images) -> Tensor:
        """Compute D's representations of images and of their reconstructions, [n, 2 d]."""
        features = self.embed(images)
        if self.discriminator.is_projection:  # G would need the labels
            return torch.from_numpy(features)
        reconstructed = self.embed(self.reconstruct(images))
        return torch.from_numpy(np.concatenate([features, reconstructed], 1))

    @cached_property
    def _novelty_detectors(self) -> dict[str, NoveltyDetector]:
        return {}

    def check_shape(self, dataset: Dataset) -> None:
        """Check that a dataset has images of this run's shape, else a UserError."""
        if dataset.info.shape != self.shape:
            found, expected = ("x".join(map(str, s)) for s in (dataset.info.shape, self.shape))
            raise UserError(
                f"{dataset.location} has images of {found} and this run expects {expected}: use "
                "data of the same image shape as the training data."
            )

    def check_classes(self, dataset: Dataset) -> None:
        """Check that the labels of a dataset, if any, are this run's classes, else a UserError."""
        if not self.classes or not dataset.info.labelled:
            return
        names = tuple(dataset.class_names())
        if names != self.classes:
            raise UserError(
                f"The classes of {dataset.location} ({_joined(names)}) are not those that this "
                f"run was trained with ({_joined(self.classes)}): give data of the same classes."
            )

    def _label_blocks(
        self, labels: NDArray[np.int64] | None, count: int, needed: bool
    ) -> Sequence[Tensor | None]:
        """Check labels [count] and split them into blocks; None a block if not needed."""
        if labels is None and not needed:
            return [None] * -(-count // BLOCK)
        if not self.classes:
            raise UserError("labels are of no use: this run was trained without classes.")
        if labels is None or len(labels) != count:
            raise UserError(
                f"This run has classes: give {count} labels, one an image, "
                f"not {'none' if labels is None else len(labels)}."
            )
        indices = torch.as_tensor(np.ascontiguousarray(labels), dtype=torch.int64)
        if indices.min() < 0 or indices.max() >= len(self.classes):
            raise UserError(
                f"labels are {indices.min()} to {indices.max()}; this run's classes are 0 to "
                f"{len(self.classes) - 1}."
            )
        blocks = indices.to(self.device).split(BLOCK)
        return blocks if needed else [None] * len(blocks)

    def _image_blocks(self, images: Images) -> Iterator[Tensor]:
        """Check images and split them into blocks, scaled to [-1, 1]."""
        if isinstance(images, np.ndarray):  # torch takes no view that is mirrored
            images = np.ascontiguousarray(images)
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
        return (to_unit(x.to(self.device), self._dtype) for x in images.split(BLOCK))

    @property
    def _dtype(self) -> torch.dtype:
        """The type of the weights: float64 where a live trainer has it."""
        return next(self.generator.parameters()).dtype


def load(run: str | Path, checkpoint: str = "last", device: str = "auto") -> TrainedModel:
    """Load the networks of a run.

    Args:
        run: Path or URI of the run folder.
        checkpoint: `last`, `best` (by the run's `checkpoint.metric`) or a checkpoint's name.
        device: `auto`, `cpu`, `cuda` or `mps`.

    Raises:
        UserError: The device, run or checkpoint does not exist, the run is of another version, a
            file is damaged, or a weight is NaN or Inf.
    """
    chosen_device = select_device(device)
    folder = RunStorage.existing(run)
    checkpoints = CheckpointStore(*folder.open())
    name = checkpoint
    if checkpoint in ("last", "best"):
        manifest = checkpoints.newest() if checkpoint == "last" else checkpoints.best()
        if manifest is None:
            missing = "no checkpoint yet" if checkpoint == "last" else "no best checkpoint yet"
            raise UserError(f"{folder} has {missing}: train it further.")
        name = manifest.name
    files = checkpoints.networks(name)
    metadata = read_metadata(files[WEIGHTS["ema_generator"]])
    height, width, channels = metadata["shape"]
    weights = {part: safetensors.torch.load(files[file]) for part, file in WEIGHTS.items()}
    for part, state in weights.items():
        for key, weight in state.items():
            if not weight.isfinite().all():
                raise UserError(
                    f"{folder}, checkpoint {name}: the weights {key} in {WEIGHTS[part]} are NaN "
                    "or Inf: take an earlier checkpoint."
                )
    return TrainedModel.from_weights(
        Config.from_yaml(metadata["config"], f"{folder}, checkpoint {name}"),
        (height, width, channels),
        weights["ema_generator"],
        weights["discriminator"],
        device=chosen_device,
        checkpoint=name,
        step=metadata["step"],
        classes=tuple(metadata["classes"]),
        counts=tuple(metadata["counts"]),
        predicted_labels=metadata.get("predicted_labels", ""),
        prior=Prior(**safetensors.torch.load(files[PRIOR_FILE])) if PRIOR_FILE in files else None,
    )


def _check_seed(seed: int, start: int) -> None:
    if seed < 0 or start < 0:
        raise UserError(f"seed {seed} and start {start} must be 0 or more.")


def _systematic_sample(counts: Tensor, random: torch.Generator) -> Tensor:
    """Draw BLOCK classes in random order, each as often as its count, to within one image."""
    order = torch.randperm(len(counts), generator=random)
    edges = counts[order].cumsum(0)
    # Equidistant points from a random offset: they never hit a class without images.
    steps = torch.arange(BLOCK) + torch.rand((), generator=random, dtype=torch.float64)
    places = torch.searchsorted(edges.double(), steps / BLOCK * edges[-1], right=True)
    return order[places[torch.randperm(BLOCK, generator=random)]]


def _joined(names: Sequence[str]) -> str:
    """Join the first 20 names."""
    return ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
