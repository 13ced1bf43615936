"""A run loaded: its networks are the run's, and what cannot be loaded or used is named."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.run_folder import leave, trained_run

import cl_ray
from cl_ray.checkpoint import CheckpointStore
from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.model import BLOCK
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer


@pytest.fixture(scope="module")
def digits(make_digits: Any) -> str:
    return make_digits(300)


@pytest.fixture(scope="module")
def trained(digits: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Trainer]:
    """A run folder with one checkpoint, and the run."""
    run = trained_run(digits)
    return leave(run, tmp_path_factory.mktemp("runs"), step=10), run


def test_the_loaded_networks_are_the_run_s(trained: tuple[Path, Trainer], digits: str) -> None:
    folder, run = trained
    loaded = cl_ray.load(folder)
    rows = Dataset.open(digits).read("train")
    x = torch.from_numpy(rows.image).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        d = run.gan.discriminator
        features = d.features(x)
        hidden = torch.nn.functional.leaky_relu(d.projection[0](features), 0.2)
        parts = [features, hidden, d.projection[2](hidden)]
        features = torch.cat([part / part.norm(dim=1, keepdim=True) for part in parts], 1)
        scores = run.gan.discriminator(x)[0]
        ema_generator = run.gan.ema_generator
        decoded = ema_generator.decode(ema_generator.encode(x))
    assert np.allclose(loaded.embed(rows.image), features, atol=1e-5)
    assert np.allclose(loaded.score(rows.image[..., 0]), scores, atol=1e-4)
    again = loaded.reconstruct(torch.from_numpy(rows.image)).astype(float)
    expected = (decoded.permute(0, 2, 3, 1) + 1) * 127.5
    assert np.abs(again - expected.numpy()).max() < 0.6
    assert loaded.step == 10
    assert loaded.shape == (28, 28, 1)


@pytest.mark.parametrize("family", ["convolutional", "residual", "style"])
def test_every_family_is_loaded_as_it_was_trained(digits: str, tmp_path: Path, family: str) -> None:
    small = {"depth": 2, "width": 4, "family": family}
    normed = {**small, "spectral_norm": family == "convolutional"}
    run = trained_run(digits, generator=small, discriminator=normed)
    loaded = cl_ray.load(leave(run, tmp_path, step=10))
    assert loaded.config.generator.family == family
    images = Dataset.open(digits).read("train").image[:20]
    x = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    run.gan.discriminator.eval()
    with torch.no_grad():
        features = run.gan.discriminator.representation(x)
        decoded = run.gan.ema_generator.decode(loaded.latents(20, seed=1))
    assert np.allclose(loaded.embed(images), features, atol=1e-5)
    made = loaded.generate(20, seed=1).astype(float)
    expected = (decoded.permute(0, 2, 3, 1) + 1) * 127.5
    assert np.abs(made - expected.numpy()).max() < 0.6
    if family == "style":
        noise = loaded.noise(20, seed=1)
        assert loaded.decode(noise, 0.3).std(0).mean() < loaded.decode(noise).std(0).mean()
        assert not np.array_equal(loaded.generate(20, seed=1, truncation=0.3), made)
    else:
        with pytest.raises(UserError, match=rf"truncation 0.3 .*{family!r}.*family style"):
            loaded.generate(20, truncation=0.3)
    with pytest.raises(UserError, match=r"truncation 1.5 must be 0 to 1"):
        loaded.generate(20, truncation=1.5)


def test_more_images_begin_with_the_same(trained: tuple[Path, Trainer]) -> None:
    loaded = cl_ray.load(str(trained[0]), checkpoint="best")
    many = loaded.generate(BLOCK + 30, seed=4)
    assert many.shape == (BLOCK + 30, 28, 28, 1)
    assert np.abs(many[:7].astype(int) - loaded.generate(7, seed=4)).max() <= 1
    middle = loaded.noise(40, seed=4, start=BLOCK - 20)
    assert torch.equal(middle, loaded.noise(BLOCK + 30, seed=4)[BLOCK - 20 : BLOCK + 20])
    assert not np.array_equal(many[:7], loaded.generate(7, seed=5))


def test_what_cannot_be_loaded_or_used_is_named(
    trained: tuple[Path, Trainer], tmp_path: Path
) -> None:
    folder, run = trained
    loaded = cl_ray.load(folder)
    with pytest.raises(UserError, match=r"takes uint8 \['n', 28, 28, 1\]"):
        loaded.embed(np.zeros((2, 32, 32), np.uint8))
    with pytest.raises(UserError, match="uint8"):
        loaded.embed(np.zeros((2, 28, 28), np.float32))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="n 0 must be"):
        loaded.generate(0)
    with pytest.raises(UserError, match=r"not a run folder"):
        cl_ray.load(tmp_path)
    with pytest.raises(UserError, match="device 'gpu' is unknown; there are: auto, cuda, mps, cpu"):
        cl_ray.load(folder, device="gpu")
    with pytest.raises(UserError, match=r"^s3://bucket/run cannot be read: ") as unreached:
        cl_ray.load("s3://me:secret@bucket/run?endpoint_override=127.0.0.1:1&scheme=http")
    assert "secret" not in str(unreached.value)
    (tmp_path / "config.yaml").write_text(run.config.to_yaml())
    with pytest.raises(UserError, match="no checkpoint yet"):
        cl_ray.load(tmp_path)
    with pytest.raises(UserError, match="there are: step-00000010"):
        cl_ray.load(folder, checkpoint="step-00000099")
    state = run.state_dict()
    state["gan"]["ema_generator"] = {
        name: weight * float("nan") for name, weight in state["gan"]["ema_generator"].items()
    }
    CheckpointStore(*RunStorage.at(str(tmp_path.parent), tmp_path.name).open()).save(
        state, epoch=1, step=3, figure=None
    )
    with pytest.raises(UserError, match="not all numbers"):
        cl_ray.load(tmp_path)
