"""Novelty: uniform for images like the training images, high for others; what it compares with."""

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import mnist, write_images
from helpers.run_folder import build_trainer, trained_run
from scipy.stats import kstest
from sklearn.covariance import oas
from torch import Tensor

from cl_ray.data.dataset import Dataset
from cl_ray.errors import UserError
from cl_ray.model import TrainedModel
from cl_ray.novelty import NoveltyDetector, describe_known, sample_known, shrunk_covariance


def normal(n: int, seed: int, d: int = 8) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def test_it_is_uniform_for_images_like_the_known_ones() -> None:
    detector = NoveltyDetector(normal(500, 1), normal(2000, 2))
    alike = detector.score(normal(2000, 3))
    assert kstest(alike.novelty, "uniform").statistic < 0.05
    assert alike.novelty.min() == 0
    unlike = detector.score(normal(2000, 3) + 4)
    assert unlike.novelty.mean() > 0.99
    assert unlike.novelty.max() == 1


def test_directions_in_which_known_images_hardly_differ_count() -> None:
    scale = torch.tensor([1.0] * 7 + [0.01])
    detector = NoveltyDetector(normal(4000, 1) * scale, normal(500, 2) * scale)
    moved = normal(100, 3) * scale
    moved[:, 7] += 0.4  # little beside the other directions
    assert detector.score(moved).novelty.min() > 0.99


@pytest.mark.parametrize("shape", [(3000, 8), (20, 40), (50, 1)])
def test_the_covariance_is_that_of_scikit_learn(shape: tuple[int, int]) -> None:
    features = normal(shape[0], 1, shape[1]) * torch.arange(1, shape[1] + 1) + 5
    expected = oas(features.double().numpy())[0]
    assert np.allclose(shrunk_covariance(features), expected, rtol=1e-10, atol=1e-12)


def test_the_middle_of_a_ring_is_novel() -> None:
    train, held_out = (torch.nn.functional.normalize(normal(500, seed, 2)) for seed in (1, 2))
    middle = 0.1 * normal(100, 3, 2)  # near their mean, and near none of them
    assert NoveltyDetector(train, held_out).score(middle).novelty.min() == 1


def test_neighbours_are_the_fifth_nearest_whatever_the_batch() -> None:
    train, x = normal(50, 1), normal(3000, 2)
    detector = NoveltyDetector(train, normal(10, 3))
    whole = detector.score(x)
    assert np.allclose(whole.distance[7:9], detector.score(x[7:9]).distance, atol=1e-4)
    near = detector.score(train[:1].repeat(2, 1) + 1e-4).distance
    assert (near > 0.1).all()  # the nearest one alone would be at 0
    few = NoveltyDetector(train[:2], normal(10, 3)).score(x)
    assert np.isfinite(few.novelty).all()


def test_equal_images_have_finite_distances() -> None:
    detector = NoveltyDetector(torch.ones(9, 4), torch.ones(3, 4))
    scores = detector.score(torch.stack([torch.ones(4), torch.zeros(4)]))
    assert np.isfinite(scores.distance).all()
    assert scores.novelty.tolist() == [0, 1]


def test_other_digits_and_noise_are_novel(tmp_path: Path) -> None:
    images, labels = mnist("train", 6000)
    ones, others = images[labels == 1], images[labels != 1][:300]
    data = write_images(
        tmp_path / "ones",
        train=(ones[:300], [None] * 300),
        validation=(ones[300:400], [None] * 100),
    )
    model = TrainedModel.from_trainer(trained_run(data))
    model.discriminator.eval()
    assert model.novelty(ones[400:]).novelty.mean() == pytest.approx(0.5, abs=0.15)
    assert model.novelty(others).novelty.mean() > 0.9
    noise = np.random.default_rng(0).integers(0, 256, (20, 28, 28, 1), np.uint8)
    assert model.novelty(noise).novelty.min() == 1
    both = Dataset.open(write_images(tmp_path / "all", train=(images[:500], labels[:500])))
    assert model.novelty(others, both).novelty.mean() < 0.8  # of a dataset with such digits


def test_a_run_with_a_condition_needs_no_labels(tmp_path: Path) -> None:
    data = write_images(tmp_path / "digits", train=mnist("train", 60))
    for condition in ("classifier", "projection"):
        model = TrainedModel.from_trainer(build_trainer(data, condition=condition))
        assert np.isfinite(model.novelty(mnist("test", 10)[0]).distance).all()


def test_known_and_held_out_images(tmp_path: Path) -> None:
    images, labels = mnist("train", 50)
    split = write_images(
        tmp_path / "split", train=(images[:40], labels[:40]), validation=(images[40:], labels[40:])
    )
    dataset = Dataset.open(split)
    assert "40 of 40 training images" in describe_known(dataset)
    assert "among 10 images of its split validation." in describe_known(dataset)
    train, held_out = sample_known(dataset)
    assert np.array_equal(train.sorted_by_id().image, dataset.read("train").sorted_by_id().image)
    assert len(held_out.image) == 10

    whole = Dataset.open(write_images(tmp_path / "whole", train=(images, labels)))
    assert "among 10 other training images: it has no split validation" in describe_known(whole)
    train, held_out = sample_known(whole)
    assert sorted([*train.id, *held_out.id]) == sorted(whole.read("train").id)
    assert len(held_out.id) == 10

    one = Dataset.open(write_images(tmp_path / "one", train=(images[:1], labels[:1])))
    with pytest.raises(UserError, match="no split validation and one training image"):
        describe_known(one)


def test_data_of_another_shape_is_refused(tmp_path: Path) -> None:
    images, labels = mnist("train", 40)
    model = TrainedModel.from_trainer(
        build_trainer(write_images(tmp_path / "small", train=(images, labels)))
    )
    padded = np.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    larger = Dataset.open(write_images(tmp_path / "larger", train=(padded, labels)))
    with pytest.raises(UserError, match="images of 32x32x1 and this run expects 28x28x1"):
        model.novelty(images, larger)
