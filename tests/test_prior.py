"""The fitted prior: its fit, its samples, and that it is saved with the run."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.run_folder import build_trainer, save_run, trained_run

from cl_ray.checkpoint import CheckpointStore
from cl_ray.inference.tasks import GenerateTask
from cl_ray.model import load
from cl_ray.prior import BANDWIDTH, WIDENING, Prior, fit_class_priors, fit_mixture, fit_prior
from cl_ray.step_log import StepLog
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer

TWO = Prior(
    torch.tensor([0.25, 0.75]),
    torch.tensor([[4.0, 0.0], [-4.0, 1.0]]),
    torch.tensor([[[1.0, 0.0], [0.5, 0.2]], [[0.1, 0.0], [0.0, 0.3]]]),
)


def sample(prior: Prior, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    noise = torch.randn(count, prior.means.shape[1], generator=random)
    return prior.transform_noise(noise, torch.rand(count, generator=random))


def covariances(prior: Prior) -> torch.Tensor:
    return prior.scale_tril @ prior.scale_tril.mT


@pytest.fixture(scope="module")
def trained(digits: str) -> Trainer:
    """After one epoch; tests leave it as it is."""
    return trained_run(digits)


def test_noise_is_transformed_by_the_selected_gaussian() -> None:
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.6, 0.9, 1 - 2**-24])
    for row, n, u in zip(TWO.transform_noise(noise, uniform), noise, uniform, strict=True):
        index = 0 if u < 0.25 else 1
        torch.testing.assert_close(row, TWO.means[index] + TWO.scale_tril[index] @ n)


def test_fit_recovers_the_mixture() -> None:
    fitted = fit_prior(sample(TWO, 20_000), components=2, seed=0)
    order = fitted.weights.argsort()
    torch.testing.assert_close(fitted.weights[order], TWO.weights, rtol=0, atol=0.02)
    torch.testing.assert_close(fitted.means[order], TWO.means, rtol=0, atol=0.05)
    widened = covariances(TWO) + WIDENING**2 * torch.eye(2)
    torch.testing.assert_close(covariances(fitted)[order], widened, rtol=0.05, atol=0.02)


@pytest.mark.parametrize("fit", [fit_prior, fit_mixture])
def test_codes_limit_the_gaussians(fit: Callable[..., Prior]) -> None:
    codes = torch.randn(1170, 4, generator=torch.Generator().manual_seed(2))
    assert len(fit(codes, components=50, seed=0).weights) == 29
    assert len(fit_mixture(codes[:90], components=50, seed=0).weights) == 2
    constant = fit(torch.ones(30, 4), components=50, seed=0)
    torch.testing.assert_close(sample(constant, 100), torch.ones(100, 4), rtol=0, atol=5 * WIDENING)


def test_few_codes_give_a_kernel_density_estimate() -> None:
    codes = sample(TWO, 90)
    prior = fit_prior(codes, components=2, seed=0)
    assert torch.equal(prior.means, codes)
    assert prior.scale_tril.shape == (1, 2, 2)
    covariance = torch.cov(codes.T, correction=0)
    bandwidth = BANDWIDTH * 90 ** (-1 / 6)
    expected = bandwidth**2 * covariance
    row = prior.transform_noise(noise := torch.tensor([[1.0, 2.0]]), torch.zeros(1))
    torch.testing.assert_close(row[0], codes[0] + prior.scale_tril[0] @ noise[0])
    torch.testing.assert_close(covariances(prior)[0], expected, rtol=0, atol=1e-3)
    samples = sample(prior, 40_000)
    torch.testing.assert_close(samples.mean(0), codes.mean(0), rtol=0, atol=0.1)
    torch.testing.assert_close(samples.T.cov(), covariance + expected, rtol=0.05, atol=0.02)


def test_each_class_has_the_mixture_of_its_own_codes() -> None:
    """Three classes: two far from each other, and one with too few codes for a Gaussian."""
    random = torch.Generator().manual_seed(3)
    labels = torch.tensor([0] * 400 + [1] * 400 + [2] * 5)[torch.randperm(805, generator=random)]
    centers = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 9.0]])
    codes = centers[labels] + 0.3 * torch.randn(805, 2, generator=random)
    prior = fit_class_priors(codes, labels, 3, components=6, seed=0)
    torch.testing.assert_close(prior.weights.sum(1), torch.ones(3))
    wanted = torch.arange(3).repeat(4000)
    noise = torch.randn(12_000, 2, generator=random)
    uniform = torch.rand(12_000, generator=random)

    def fraction_near(samples: torch.Tensor, number: int) -> float:
        return ((samples - centers[number]).norm(dim=1) < 3).double().mean().item()

    samples = prior.transform_noise(noise, uniform, wanted)
    for number in (0, 1):
        mine = wanted == number
        own = fit_mixture(codes[labels == number], components=2, seed=0)
        expected = own.transform_noise(noise[mine], uniform[mine])
        torch.testing.assert_close(samples[mine], expected)
        assert fraction_near(samples[mine], number) == 1
        assert fraction_near(samples[wanted == 2], number) == pytest.approx(0.5, abs=0.05)
    without_labels = prior.transform_noise(noise, uniform)
    assert fraction_near(without_labels, 0) == pytest.approx(0.5, abs=0.05)
    last = prior.transform_noise(noise, torch.full((12_000,), 1 - 2**-24), wanted)
    assert fraction_near(last[wanted == 0], 0) == 1


def test_an_epoch_ends_with_a_fit_to_the_codes(trained: Trainer) -> None:
    prior, images = trained.prior, trained.prior_fitter.images
    assert prior is not None
    assert images is not None
    assert trained.prior_fitter.labels is None
    codes = trained.gan.ema_generator.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).detach()
    torch.testing.assert_close(sample(prior, 20_000).mean(0), codes.mean(0), rtol=0, atol=0.05)
    g = trained.config.generator
    again = fit_prior(codes, g.prior, trained.config.seed)
    torch.testing.assert_close(again.means, prior.means, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("latent", "pixels", "images", "gaussians"),
    [(20, 2**28, 5000, 25), (21, 2**28, 5300, 5300), (21, 5100 * 784, 5100, 5100),
     (21, 784, 5000, 5000)],
)  # fmt: skip
def test_in_many_dimensions_more_images_have_a_kernel_each(
    monkeypatch: pytest.MonkeyPatch, latent: int, pixels: int, images: int, gaussians: int
) -> None:
    monkeypatch.setattr("cl_ray.prior.KERNELS", 5300)
    monkeypatch.setattr("cl_ray.prior._KERNEL_BYTES", pixels)
    trainer = build_trainer("mnist", generator={"depth": 1, "width": 4, "latent": latent})
    trainer.fit_prior()
    assert trainer.prior is not None
    assert trainer.prior_fitter.images is not None
    assert len(trainer.prior_fitter.images) == images
    assert len(trainer.prior.weights) == gaussians


def test_a_state_within_an_epoch_has_the_prior_of_its_step(digits: str) -> None:
    trainer = build_trainer(digits, checkpoint={"every": 4})
    means: list[torch.Tensor] = []

    def on_log(log: StepLog) -> None:
        if log.step in (4, 8, 12, 16):
            before = torch.random.get_rng_state()
            means.append(trainer.state_dict()["prior"]["means"])
            assert torch.equal(before, torch.random.get_rng_state())

    for _ in range(2):
        trainer.train_epoch(on_log)
    assert len(means) == 4
    assert len({float(mean.sum()) for mean in means}) == 4  # each fitted to the codes of its step
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
    assert torch.equal(resumed.prior.means, state["prior"]["means"])


def test_without_components_samples_come_from_the_training_prior(
    digits: str, tmp_path: Path
) -> None:
    trainer = trained_run(digits, generator={"depth": 2, "width": 4, "prior": 0})
    assert trainer.prior is None
    loaded = load(save_run(trainer, tmp_path, 22), device="cpu")
    assert loaded.prior is None
    assert torch.equal(loaded.latents(20, seed=1), loaded.noise(20, seed=1))
