"""What samples are drawn from: fitted to where the codes lie, and kept with the run."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.run_folder import begun, leave, trained_run

from cl_ray.checkpoint import CheckpointStore
from cl_ray.inference.work import FromNoise, note
from cl_ray.model import load
from cl_ray.prior import Prior, fit_class_priors, fit_prior
from cl_ray.storage import RunStorage
from cl_ray.trainer import StepLog

TWO = Prior(
    torch.tensor([0.25, 0.75]),
    torch.tensor([[4.0, 0.0], [-4.0, 1.0]]),
    torch.tensor([[[1.0, 0.0], [0.5, 0.2]], [[0.1, 0.0], [0.0, 0.3]]]),
)


def drawn(prior: Prior, count: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(5)
    noise = torch.randn(count, prior.means.shape[1], generator=random)
    return prior.place(noise, torch.rand(count, generator=random))


@pytest.fixture(scope="module")
def digits(make_digits: Any) -> str:
    return make_digits(700)


def test_places_noise_as_each_gaussian_says() -> None:
    noise = torch.randn(6, 2, generator=torch.Generator().manual_seed(1))
    chance = torch.tensor([0.0, 0.2499, 0.25, 0.6, 0.9, 1 - 2**-24])
    found = TWO.place(noise, chance)
    for row, (n, c) in enumerate(zip(noise, chance, strict=True)):
        which = 0 if c < 0.25 else 1
        expected = TWO.means[which] + TWO.roots[which] @ n
        torch.testing.assert_close(found[row], expected)


def test_a_fit_finds_what_codes_were_drawn_from() -> None:
    found = fit_prior(drawn(TWO, 20_000), components=2, seed=0)
    order = found.weights.argsort()
    torch.testing.assert_close(found.weights[order], TWO.weights, rtol=0, atol=0.02)
    torch.testing.assert_close(found.means[order], TWO.means, rtol=0, atol=0.05)
    ours, theirs = (p.roots @ p.roots.mT for p in (found, TWO))
    torch.testing.assert_close(ours[order], theirs, rtol=0.05, atol=0.02)


def test_it_is_widened_by_half_the_jitter() -> None:
    codes = drawn(TWO, 2000)
    narrow, wide = (
        fit_prior(codes, components=2, seed=0),
        fit_prior(codes, components=2, seed=0, latent_noise_std=0.8),
    )
    ours, theirs = (p.roots @ p.roots.mT for p in (wide, narrow))
    torch.testing.assert_close(ours - theirs, 0.16 * torch.eye(2).expand(2, 2, 2))


def test_few_codes_make_few_gaussians() -> None:
    codes = torch.randn(90, 4, generator=torch.Generator().manual_seed(2))
    assert len(fit_prior(codes, components=50, seed=0).weights) == 2
    alike = fit_prior(torch.ones(30, 4), components=50, seed=0)
    torch.testing.assert_close(drawn(alike, 100), torch.ones(100, 4), rtol=0, atol=0.1)


def test_each_class_has_the_density_of_its_own_codes() -> None:
    """Three classes: two far from each other, and one with too few codes for a density."""
    random = torch.Generator().manual_seed(3)
    labels = torch.tensor([0] * 400 + [1] * 400 + [2] * 5)[torch.randperm(805, generator=random)]
    centres = torch.tensor([[5.0, 0.0], [-5.0, 0.0], [0.0, 9.0]])
    codes = centres[labels] + 0.3 * torch.randn(805, 2, generator=random)
    prior = fit_class_priors(codes, labels, 3, components=6, seed=0)
    torch.testing.assert_close(prior.weights.sum(1), torch.ones(3))
    kinds = torch.arange(3).repeat(4000)
    noise, chance = (
        torch.randn(12_000, 2, generator=random),
        torch.rand(12_000, generator=random),
    )
    found = prior.place(noise, chance, kinds)
    for kind in (0, 1):
        alone = fit_prior(codes[labels == kind], components=2, seed=0)
        expected = alone.place(noise[kinds == kind], chance[kinds == kind])
        torch.testing.assert_close(found[kinds == kind], expected)
        assert (found[kinds == kind] - centres[kind]).norm(dim=1).max() < 3
    of_all = found[kinds == 2]
    for centre in centres[:2]:
        assert ((of_all - centre).norm(dim=1) < 3).float().mean() == pytest.approx(0.5, abs=0.05)
    alike = prior.place(noise, chance)  # no class named
    assert ((alike - centres[0]).norm(dim=1) < 3).float().mean() == pytest.approx(0.5, abs=0.05)
    ends = prior.place(noise, torch.full((12_000,), 1 - 2**-24), kinds)
    assert (ends[kinds == 0] - centres[0]).norm(dim=1).max() < 3


def test_an_epoch_ends_with_a_fit_to_its_own_codes(digits: str) -> None:
    run = trained_run(digits)
    assert run.prior is not None
    assert run.drawn is not None
    images, labels = run.drawn
    assert labels is None
    codes = run.gan.ema_generator.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).detach()
    torch.testing.assert_close(drawn(run.prior, 20_000).mean(0), codes.mean(0), rtol=0, atol=0.05)
    generator = run.config.generator
    again = fit_prior(codes, generator.prior, run.config.seed, generator.latent_noise_std)
    torch.testing.assert_close(again.means, run.prior.means, rtol=1e-3, atol=1e-3)


def test_a_checkpoint_of_the_first_epoch_has_one_of_its_own(digits: str) -> None:
    run = begun(digits, checkpoint={"every": 4})
    saved: list[torch.Tensor] = []

    def watch(record: StepLog) -> None:
        if record.step in (4, 8):
            before = torch.random.get_rng_state()
            saved.append(run.state_dict()["prior"]["means"])
            assert torch.equal(before, torch.random.get_rng_state())

    run.train_epoch(watch)
    assert len(saved) == 2
    assert not torch.equal(saved[0], saved[1])  # each of the codes of its own time


def test_one_that_is_missing_is_said(digits: str, tmp_path: Path) -> None:
    run = trained_run(digits)
    run.prior = None
    loaded = load(leave(run, tmp_path, 22), device="cpu")
    with pytest.warns(UserWarning, match="no density of latent vectors"):
        images = loaded.generate(4)
    assert np.array_equal(images, loaded.decode(loaded.noise(4)))
    assert note(FromNoise(4, seed=0), loaded).startswith("This checkpoint has no density")


def test_samples_come_from_it_also_when_loaded(digits: str, tmp_path: Path) -> None:
    run = trained_run(digits)
    loaded = load(leave(run, tmp_path, 22), device="cpu")
    assert run.prior is not None
    assert loaded.prior is not None
    for ours, theirs in zip(loaded.prior, run.prior, strict=True):
        assert torch.equal(ours, theirs)
    images = loaded.generate(40, seed=3)
    assert np.array_equal(images, loaded.decode(loaded.latents(40, seed=3)))
    assert not np.array_equal(images, loaded.decode(loaded.noise(40, seed=3)))
    # More samples begin with the same, across blocks too.
    assert np.array_equal(loaded.generate(700, seed=3)[480:520], loaded.generate(40, 3, start=480))


def test_goes_on_with_what_was_fitted(digits: str, tmp_path: Path) -> None:
    run = trained_run(digits)
    folder = RunStorage.of(leave(run, tmp_path, 22))
    state = CheckpointStore(*folder.open()).load("step-00000022")
    run.prior = None
    run.load_state_dict(state)
    assert run.prior is not None
    assert torch.equal(run.prior.means, state["prior"]["means"])


def test_without_it_samples_come_from_the_noise_of_training(digits: str, tmp_path: Path) -> None:
    run = trained_run(digits, generator={"depth": 2, "width": 4, "prior": 0})
    assert run.prior is None
    loaded = load(leave(run, tmp_path, 22), device="cpu")
    assert loaded.prior is None
    assert torch.equal(loaded.latents(20, seed=1), loaded.noise(20, seed=1))
