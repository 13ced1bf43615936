"""A trained model: its networks are the run's, its samples follow from the seed; errors."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import mnist, write_images
from helpers.run_folder import build_trainer, save_run, trained_run

import cl_ray
from cl_ray.checkpoint import CheckpointStore
from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.model import TrainedModel
from cl_ray.networks.build import FAMILIES
from cl_ray.rng import BLOCK
from cl_ray.storage import RunStorage
from cl_ray.train_config import TrainerConfig
from cl_ray.trainer import Trainer


@pytest.fixture(scope="module")
def trained(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run folder with one checkpoint, and the trainer."""
    trainer = trained_run(digits)
    return save_run(trainer, tmp_path_factory.mktemp("runs"), step=10), trainer


def test_the_loaded_networks_are_the_run_s(trained: tuple[Path, Trainer], digits: str) -> None:
    folder, trainer = trained
    state = torch.random.get_rng_state()
    model = cl_ray.load(folder)
    assert torch.equal(torch.random.get_rng_state(), state)
    rows = Dataset.open(digits).read("train")
    x = torch.from_numpy(rows.image).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        d = trainer.gan.discriminator
        features = d.features(x)
        hidden = torch.nn.functional.leaky_relu(d.projection[0](features), 0.2)
        parts = [features, hidden, d.projection[2](hidden)]
        features = torch.cat([part / part.norm(dim=1, keepdim=True) for part in parts], 1)
        scores = d(x)[0]
        ema_generator = trainer.gan.ema_generator
        decoded = ema_generator.decode(ema_generator.encode(x))
    assert np.allclose(model.embed(rows.image), features, atol=1e-5)
    assert np.allclose(model.score(rows.image[..., 0]), scores, atol=1e-4)
    again = model.reconstruct(torch.from_numpy(rows.image)).astype(float)
    expected = (decoded.permute(0, 2, 3, 1) + 1) * 127.5
    assert np.abs(again - expected.numpy()).max() < 0.6
    assert (model.step, model.shape) == (10, (28, 28, 1))


def test_a_live_trainer_gives_the_same_model(trained: tuple[Path, Trainer]) -> None:
    folder, trainer = trained
    loaded, live = cl_ray.load(folder), TrainedModel.from_trainer(trainer)
    assert live.generator is trainer.gan.ema_generator
    assert (live.step, live.checkpoint) == (trainer.gan.steps, f"step-{trainer.gan.steps:08d}")
    assert (live.config, live.shape, live.classes) == (loaded.config, loaded.shape, loaded.classes)
    assert np.abs(live.generate(7, seed=2).astype(int) - loaded.generate(7, seed=2)).max() <= 1
    part = {name: getattr(trainer.config, name) for name in TrainerConfig.model_fields}
    bare = Trainer(TrainerConfig(**part), trainer.loader)
    assert TrainedModel.from_trainer(bare).config.generator == trainer.config.generator


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_loaded_as_it_was_trained(digits: str, tmp_path: Path, family: str) -> None:
    small = {"depth": 2, "width": 4, "family": family}
    normed = {**small, "spectral_norm": family == "convolutional"}
    trainer = trained_run(digits, generator=small, discriminator=normed)
    model = cl_ray.load(save_run(trainer, tmp_path, step=10))
    assert model.config.generator.family == family
    images, _ = mnist("train", 20)
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    trainer.gan.discriminator.eval()
    with torch.no_grad():
        features = trainer.gan.discriminator.representation(x)
        decoded = trainer.gan.ema_generator.decode(model.latents(20, seed=1))
    assert np.allclose(model.embed(images), features, atol=1e-5)
    generated = model.generate(20, seed=1).astype(float)
    expected = (decoded.permute(0, 2, 3, 1) + 1) * 127.5
    assert np.abs(generated - expected.numpy()).max() < 0.6
    if family == "style":
        noise = model.noise(20, seed=1)
        assert model.decode(noise, 0.3).std(0).mean() < model.decode(noise).std(0).mean()
        assert not np.array_equal(model.generate(20, seed=1, truncation=0.3), generated)
    else:
        with pytest.raises(UserError, match=rf"truncation 0.3 .*{family!r}.*family style"):
            model.generate(20, truncation=0.3)
    with pytest.raises(UserError, match=r"truncation 1.5 must be 0 to 1"):
        model.generate(20, truncation=1.5)


def test_more_images_begin_with_the_same(trained: tuple[Path, Trainer]) -> None:
    model = cl_ray.load(str(trained[0]), checkpoint="best")
    many = model.generate(BLOCK + 30, seed=4)
    assert many.shape == (BLOCK + 30, 28, 28, 1)
    assert np.abs(many[:7].astype(int) - model.generate(7, seed=4)).max() <= 1
    middle = model.noise(40, seed=4, start=BLOCK - 20)
    assert torch.equal(middle, model.noise(BLOCK + 30, seed=4)[BLOCK - 20 : BLOCK + 20])
    assert not np.array_equal(many[:7], model.generate(7, seed=5))


def test_what_cannot_be_loaded_or_used_is_named(
    trained: tuple[Path, Trainer], tmp_path: Path
) -> None:
    folder, trainer = trained
    model = cl_ray.load(folder)
    with pytest.raises(UserError, match=r"takes uint8 \['n', 28, 28, 1\]"):
        model.embed(np.zeros((2, 32, 32), np.uint8))
    with pytest.raises(UserError, match="uint8"):
        model.embed(np.zeros((2, 28, 28), np.float32))
    with pytest.raises(UserError, match="n 0 must be"):
        model.generate(0)
    with pytest.raises(UserError, match=r"not a run folder"):
        cl_ray.load(tmp_path)
    with pytest.raises(UserError, match="device 'gpu' is unknown; there are: auto, cuda, mps, cpu"):
        cl_ray.load(folder, device="gpu")
    with pytest.raises(UserError, match=r"^s3://bucket/run cannot be read: "):
        cl_ray.load("s3://bucket/run?endpoint_override=127.0.0.1:1&scheme=http")
    (tmp_path / "config.yaml").write_text(trainer.config.to_yaml())
    with pytest.raises(UserError, match="no checkpoint yet"):
        cl_ray.load(tmp_path)
    with pytest.raises(UserError, match="there are: step-00000010"):
        cl_ray.load(folder, checkpoint="step-00000099")
    state = trainer.state_dict()
    state["gan"]["ema_generator"] = {
        name: weight * float("nan") for name, weight in state["gan"]["ema_generator"].items()
    }
    CheckpointStore(*RunStorage.at(str(tmp_path.parent), tmp_path.name).open()).save(
        state, epoch=1, step=3
    )
    with pytest.raises(UserError, match="are NaN or Inf: take an earlier"):
        cl_ray.load(tmp_path)


def test_arguments_of_decode_and_generate_are_checked(trained: tuple[Path, Trainer]) -> None:
    model = cl_ray.load(trained[0])
    codes = model.latents(3)
    expected = model.decode(codes)
    for same in (codes.numpy(), codes.double()):
        assert np.array_equal(model.decode(same), expected)
    with pytest.raises(UserError, match=r"truncation 0\.1 is for a style-based generator"):
        model.decode(codes, truncation=0.1)
    for wrong in (codes[:, :-1], codes[:0], codes[0]):
        with pytest.raises(UserError, match=r"latents are \[.*\]; this run takes \[n, \d+\]"):
            model.decode(wrong)
    for refused in ({"seed": -1}, {"start": -1}):
        with pytest.raises(UserError, match="must be 0 or more"):
            model.generate(4, **refused)


def test_mirrored_views_of_images_are_taken(trained: tuple[Path, Trainer], digits: str) -> None:
    model, images = cl_ray.load(trained[0]), Dataset.open(digits).read("train").image[:5]
    mirrored = images[:, :, ::-1]
    assert np.array_equal(model.embed(mirrored), model.embed(mirrored.copy()))


def test_a_live_model_of_float64_works(digits: str) -> None:
    small = build_trainer(digits)
    trainer = Trainer(small.config, small.loader, torch.device("cpu"), torch.float64)
    trainer.train_epoch()
    model, images = TrainedModel.from_trainer(trainer), Dataset.open(digits).read("train").image[:5]
    assert model.generate(3).dtype == np.uint8
    assert {model.embed(images).dtype, model.score(images).dtype} == {np.dtype(np.float32)}
    assert model.encode(images).dtype == torch.float32


def test_samples_of_the_prior_are_the_same_in_any_parts(trained: tuple[Path, Trainer]) -> None:
    model = cl_ray.load(trained[0])
    assert model.prior is not None
    parts = model.latents(37), model.latents(63, start=37)
    assert torch.equal(torch.cat(parts), model.latents(100))


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> TrainedModel:
    """A conditional model of digits without a 3, with half of the 1s, and one more class name."""
    images, labels = mnist("train", 300)
    keep = (labels != 3) & ((labels != 1) | (np.cumsum(labels == 1) % 2 == 0))
    folder = tmp_path_factory.mktemp("data") / "uneven"
    names = [*"0123456789", "ten"]
    data = write_images(folder, classes=names, train=(images[keep], labels[keep]))
    trainer = build_trainer(data, condition="projection")
    return cl_ray.load(save_run(trainer, tmp_path_factory.mktemp("runs"), step=1))


def sampled(model: TrainedModel, n: int, seed: int = 3, start: int = 0) -> np.ndarray:
    labels = model.sample_labels(n, seed, start)
    assert labels is not None
    return labels


def test_classes_are_as_frequent_as_among_the_training_images(uneven: TrainedModel) -> None:
    labels = Dataset.open(uneven.config.data).read("train").label
    assert labels is not None
    counts = np.bincount(labels, minlength=11)
    assert uneven.counts == tuple(counts)
    assert counts[3] == counts[10] == 0
    for block in range(4):
        found = np.bincount(sampled(uneven, BLOCK, start=block * BLOCK), minlength=11)
        assert np.abs(found - BLOCK * counts / counts.sum()).max() < 1
        assert found[3] == found[10] == 0


def test_more_labels_begin_with_the_same_and_each_is_decoded_as_its_class(
    uneven: TrainedModel,
) -> None:
    labels, n = sampled(uneven, 3 * BLOCK), BLOCK + 20
    part = sampled(uneven, BLOCK + 75, start=BLOCK - 23)
    assert np.array_equal(part, labels[BLOCK - 23 :][: BLOCK + 75])
    assert not np.array_equal(sampled(uneven, 70, seed=4), labels[:70])
    assert not np.array_equal(labels[:BLOCK], labels[BLOCK : 2 * BLOCK])
    assert len(np.unique(labels[:40])) > 5  # mixed, not one class after another
    decoded = uneven.decode(uneven.latents(n, 3, labels=labels[:n]), labels=labels[:n])
    assert np.abs(uneven.generate(n, seed=3).astype(int) - decoded).max() <= 1


def test_more_classes_than_a_block_has_images_are_all_sampled(uneven: TrainedModel) -> None:
    count = 2 * BLOCK
    thousand = replace(uneven, classes=tuple(map(str, range(count))), counts=(3,) * count)
    found = np.bincount(sampled(thousand, 40 * BLOCK), minlength=count)
    assert found.mean() == 20
    assert found.min() > 5
    assert found.max() < 40  # of each block a half, drawn anew: a standard deviation of 3.2
    rare = replace(uneven, counts=(10**6, *[1] * 10))
    assert np.bincount(sampled(rare, 20 * BLOCK), minlength=11)[1:].sum() <= 20


def test_a_class_without_training_images_is_refused(uneven: TrainedModel) -> None:
    message = r"class '?3'? had no training image.* images are: 0, 1, 2, 4, 5, 6, 7, 8, 9\."
    for label in (3, "3"):
        with pytest.raises(UserError, match=message):
            uneven.generate(2, label=label)
    with pytest.raises(UserError, match="class 'ten' had no training image"):
        uneven.class_index("ten")
    assert uneven.generate(2, label="4").shape == (2, 28, 28, 1)
