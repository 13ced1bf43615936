"""Interpolations and nearest images against plain versions, and images of each class."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.datasets import mnist
from helpers.reported_run import write_digits
from helpers.run_folder import save_run, trained_run

import cl_ray
from cl_ray.data.dataset import Dataset
from cl_ray.data.writer import DatasetMetadata, RawImage, write_splits
from cl_ray.report.galleries import (
    MAX_CLASSES,
    SEED,
    class_grids,
    nearest_pixels,
    nearest_training_images,
    shown_classes,
    slerp,
)
from cl_ray.report.page import write_run_report


def test_interpolation_is_shoemakes_formula() -> None:
    """Where no angle is near 0 or pi."""
    start, end = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)).double()
    a, b = (torch.nn.functional.normalize(z, dim=1)[:, None] for z in (start, end))
    t, angle = torch.linspace(0, 1, 7).double()[:, None], (a * b).sum(2, keepdim=True).acos()
    plain = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    assert torch.allclose(slerp(start, end, 7), plain * 10**0.5)


def test_interpolation_between_equal_and_between_opposite_ends() -> None:
    z = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(slerp(z, z, 4) / 10**0.5, torch.nn.functional.normalize(z)[:, None])
    points = slerp(z, -z, 5)
    assert points.isfinite().all()
    assert torch.allclose(points[:, 0], -points[:, -1], atol=1e-5)
    assert torch.allclose((points[:, 0] * points[:, 2]).sum(1), torch.zeros(3), atol=1e-5)


def test_the_nearest_are_those_of_all_pairs() -> None:
    random = np.random.default_rng(0)
    bank = random.integers(0, 256, (40, 8, 8, 3), np.uint8)
    queries = np.concatenate([random.integers(0, 256, (5, 8, 8, 3), np.uint8), bank[[31, 3]]])
    rows, distances = nearest_pixels(bank, queries, 4)
    flat = [images.reshape(len(images), -1) / 255 for images in (queries, bank)]
    expected = np.linalg.norm(flat[0][:, None] - flat[1], axis=2)
    assert np.array_equal(rows, np.argsort(expected, 1)[:, :4])
    assert np.allclose(distances, np.sort(expected, 1)[:, :4])
    assert distances[5:, 0].tolist() == [0, 0]  # a copy is a copy exactly
    assert nearest_pixels(bank[:2], queries, 4)[0].shape == (7, 2)


def test_copies_among_the_samples_are_found(trained: Path, digits: str) -> None:
    run, dataset = cl_ray.load(trained), Dataset.open(digits)
    test = dataset.read("test")
    honest = nearest_training_images(run, dataset, test)
    assert honest.is_whole
    assert honest.bank == 300
    assert honest.median > 1
    assert honest.baseline is not None
    assert honest.nearer is not None

    class Copier:
        """A G that returns training images."""

        shape = run.shape

        def generate(self, n: int, seed: int) -> np.ndarray:
            rows = np.random.default_rng(seed).integers(0, 300, n)
            return dataset.read("train").image[rows]

    copies = nearest_training_images(Copier(), dataset, test)  # type: ignore[arg-type]
    assert copies.median == 0
    assert copies.nearer == 1
    assert {sample.label for sample, _ in copies.rows} == {"0.00"}
    nearest = [float(sample.label) for sample, _ in honest.rows]
    assert nearest[:4] == sorted(nearest[:4])
    assert min(nearest[4:]) >= nearest[3]
    assert nearest_training_images(run, dataset, None).baseline is None


def test_the_nearest_images_are_named(trained: Path, tmp_path: Path) -> None:
    images, _ = mnist("train", 12)
    raw = [RawImage(x, None, "digit", origin=f"{n}.png") for n, x in enumerate(images)]
    write_splits({"train": raw}, str(tmp_path / "d"), DatasetMetadata("d", "a test"))
    dataset, run = Dataset.open(str(tmp_path / "d")), cl_ray.load(trained)
    found = nearest_training_images(run, dataset, None)
    samples = run.generate(400, SEED)
    away = ((images[None].astype(float) - samples[:, None]) ** 2).sum((2, 3, 4))
    order = away[away.min(1).argmin()].argsort()
    nearest = ", ".join(f"{n}.png" for n in order)
    assert nearest.startswith(
        found.rows[0][1].alt.removeprefix("Its nearest training images: ")[:-1]
    )


@pytest.fixture(scope="module")
def conditional(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was trained with labels."""
    data = write_digits(tmp_path_factory.mktemp("digits") / "digits")
    run = trained_run(data, condition="classifier")
    return save_run(run, tmp_path_factory.mktemp("runs"), 10)


def test_each_class_has_a_named_row(conditional: Path) -> None:
    rows = class_grids(cl_ray.load(conditional))
    assert [row.label for row in rows] == list("0123456789")
    assert len({row.source for row in rows}) == 10
    page = Path(write_run_report(conditional).location).read_text()
    part = page.partition("<h3>By class</h3>")[2].partition("<h3>")[0]
    assert re.findall(r"<span>(\w+)</span>", part) == list("0123456789")
    assert "Between noise vectors a row is of one class" in page
    assert "D was trained with the labels" in page


def test_of_many_classes_some_with_images_are_shown(conditional: Path) -> None:
    run = cl_ray.load(conditional)
    many = replace(run, classes=tuple(map(str, range(100))), counts=(0, 3) * 50)
    shown = shown_classes(many, MAX_CLASSES)
    assert len(set(shown)) == MAX_CLASSES
    assert all(index % 2 for index in shown)
    assert shown[-1] > 90
    assert shown_classes(replace(run, counts=()), MAX_CLASSES) == list(range(10))
