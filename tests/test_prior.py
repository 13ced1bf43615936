"""The fitted prior: its fit, its samples, and that it is saved with the run."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.run_folder import build_trainer, save_run, trained_run

from cl_ray.checkpoint import CheckpointStore
from cl_ray.inference.tasks import GenerateTask
from cl_ray.model import load
from cl_ray.prior import BANDWIDTH, MIN_VARIANCE, Prior, fit_prior
from cl_ray.step_log import StepLog
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer

TWO = Prior(
    codes=torch.tensor([[4.0, 0.0], [-4.0, 1.0], [-5.0, 1.0], [-6.0, 1.0]]),
    starts=torch.tensor([0, 1]),
    counts=torch.tensor([1, 3]),
    scale_tril=torch.tensor([[1.0, 0.0], [0.5, 0.2]]),
)
"""Of two classes."""


def sample(prior: Prior, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    noise = torch.randn(count, prior.codes.shape[1], generator=random)
    return prior.transform_noise(noise, torch.rand(count, generator=random))


@pytest.fixture(scope="module")
def trained(digits: str) -> Trainer:
    """After one epoch; tests leave it as it is."""
    return trained_run(digits)


def test_noise_moves_the_selected_code() -> None:
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.6, 0.9, 1 - 2**-24])
    rows = TWO.transform_noise(noise, uniform)
    for row, n, index in zip(rows, noise, [0, 0, 1, 2, 3, 3], strict=True):
        torch.testing.assert_close(row, TWO.codes[index] + TWO.scale_tril @ n)
    of_class = TWO.transform_noise(noise, uniform, torch.tensor([0, 1, 0, 1, 1, 1]))
    for row, n, index in zip(of_class, noise, [0, 1, 0, 2, 3, 3], strict=True):
        torch.testing.assert_close(row, TWO.codes[index] + TWO.scale_tril @ n)


def test_noise_is_a_fraction_of_the_codes_covariance() -> None:
    codes = sample(TWO, 90)
    prior = fit_prior(codes)
    assert torch.equal(prior.codes, codes)
    covariance = torch.cov(codes.T, correction=0)
    bandwidth = BANDWIDTH * 90 ** (-1 / 6)  # in two dimensions the first factor is 1
    expected = bandwidth**2 * covariance + MIN_VARIANCE * torch.eye(2)
    torch.testing.assert_close(prior.scale_tril @ prior.scale_tril.T, expected)
    samples = sample(prior, 40_000)
    torch.testing.assert_close(samples.mean(0), codes.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(samples.T.cov(), covariance + expected, rtol=0.05, atol=0.02)
    equal = fit_prior(torch.ones(30, 4))
    torch.testing.assert_close(sample(equal, 100), torch.ones(100, 4), rtol=0, atol=0.05)


def test_each_class_has_its_own_codes() -> None:
    """Three classes: two far from each other, and one without a code."""
    random = torch.Generator().manual_seed(3)
    labels = torch.tensor([0] * 600 + [1] * 200)[torch.randperm(800, generator=random)]
    centers = torch.tensor([[5.0, 0.0], [-5.0, 0.0]])
    codes = centers[labels] + 0.3 * torch.randn(800, 2, generator=random)
    prior = fit_prior(codes, labels, 3)
    noise, uniform = torch.randn(9000, 2, generator=random), torch.rand(9000, generator=random)
    wanted = torch.arange(3).repeat(3000)
    samples = prior.transform_noise(noise, uniform, wanted)
    for number in (0, 1):
        of_class = samples[wanted == number]
        distance = (of_class - codes[labels == number].mean(0)).norm(dim=1)
        assert distance.max() < 2
        # The spread of the codes within their class, not that between the classes.
        expected = codes[labels == number].var(0) + prior.scale_tril.square().sum(1)
        torch.testing.assert_close(of_class.var(0), expected, rtol=0.1, atol=0)
        assert expected.max() < 0.2
    for any_class in (samples[wanted == 2], prior.transform_noise(noise, uniform)):
        assert (any_class[:, 0] > 0).double().mean().item() == pytest.approx(0.75, abs=0.03)


def test_an_epoch_ends_with_a_fit_to_the_codes(trained: Trainer) -> None:
    prior, images = trained.prior, trained.prior_fitter.images
    assert prior is not None
    assert images is not None
    codes = trained.gan.ema_generator.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).detach()
    torch.testing.assert_close(prior.codes, codes, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prior.scale_tril, fit_prior(codes).scale_tril)


@pytest.mark.parametrize(
    ("latent", "pixels", "wanted", "codes"),
    [(64, 2**28, 5300, 5300), (128, 2**28, 5300, 5150), (2, 5100 * 784, 5300, 5100),
     (2, 784, 5300, 5000), (2, 784, 40, 40)],
)  # fmt: skip
def test_memory_limits_the_codes(
    monkeypatch: pytest.MonkeyPatch, latent: int, pixels: int, wanted: int, codes: int
) -> None:
    monkeypatch.setattr("cl_ray.prior._MAX_VALUES", 5150 * 128)
    monkeypatch.setattr("cl_ray.prior._MAX_BYTES", pixels)
    network = {"depth": 1, "width": 4, "latent": latent, "prior_codes": wanted}
    trainer = build_trainer("mnist", generator=network)
    trainer.fit_prior()
    assert trainer.prior is not None
    assert len(trainer.prior.codes) == codes


def test_a_state_within_an_epoch_has_the_prior_of_its_step(digits: str) -> None:
    trainer = build_trainer(digits, checkpoint={"every": 4})
    codes: list[torch.Tensor] = []

    def on_log(log: StepLog) -> None:
        if log.step in (4, 8, 12, 16):
            before = torch.random.get_rng_state()
            codes.append(trainer.state_dict()["prior"]["codes"])
            assert torch.equal(before, torch.random.get_rng_state())

    for _ in range(2):
        trainer.train_epoch(on_log)
    assert len(codes) == 4
    assert len({float(part.sum()) for part in codes}) == 4  # each fitted to the codes of its step
    trainer.gan.steps *= 20  # of so many steps, few were taken since the last fit
    assert trainer.state_dict()["prior_step"] == trainer.gan.steps
    trainer.gan.steps += 10
    assert trainer.state_dict()["prior_step"] == trainer.gan.steps - 10


def test_missing_prior_is_reported(
    trained: Trainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trained, "prior", None)
    loaded = load(save_run(trained, tmp_path, 22), device="cpu")
    with pytest.warns(UserWarning, match="no fitted prior"):
        images = loaded.generate(4)
    assert np.array_equal(images, loaded.decode(loaded.noise(4)))
    assert "no fitted prior" in GenerateTask(4, seed=0).note(loaded)


def test_loaded_model_samples_from_the_prior(trained: Trainer, digits: str, tmp_path: Path) -> None:
    folder = save_run(trained, tmp_path, 22)
    loaded = load(folder, device="cpu")
    assert trained.prior is not None
    assert loaded.prior is not None
    for ours, theirs in zip(loaded.prior, trained.prior, strict=True):
        assert torch.equal(ours, theirs)
    images = loaded.generate(40, seed=3)
    assert np.array_equal(images, loaded.decode(loaded.latents(40, seed=3)))
    assert not np.array_equal(images, loaded.decode(loaded.noise(40, seed=3)))
    # More samples begin with the same ones, also across blocks.
    assert np.array_equal(loaded.generate(700, seed=3)[480:520], loaded.generate(40, 3, start=480))
    # A resumed run has it as well.
    state = CheckpointStore(*RunStorage.from_uri(folder).open()).load("step-00000022")
    resumed = build_trainer(digits)
    resumed.load_state_dict(state)
    assert resumed.prior is not None
    assert torch.equal(resumed.prior.codes, state["prior"]["codes"])


def test_without_codes_samples_come_from_the_training_prior(digits: str, tmp_path: Path) -> None:
    trainer = trained_run(digits, generator={"depth": 2, "width": 4, "prior_codes": 0})
    assert trainer.prior is None
    loaded = load(save_run(trainer, tmp_path, 22), device="cpu")
    assert loaded.prior is None
    assert torch.equal(loaded.latents(20, seed=1), loaded.noise(20, seed=1))
