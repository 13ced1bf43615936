"""Ways on the sphere, nearest images, maps and the projector's files, against plain versions."""

from pathlib import Path

import numpy as np
import pytest
import torch
from google.protobuf import text_format
from helpers.reported_run import TEST, folder_of
from PIL import Image
from tensorboard.plugins.projector.projector_config_pb2 import ProjectorConfig

import cl_ray
from cl_ray.data.dataset import Dataset
from cl_ray.report import galleries as shows
from cl_ray.report.embedding import embedding_map
from cl_ray.report.interpolation import slerp
from cl_ray.report.neighbours import nearest_pixels
from cl_ray.report.page import write_run_report


def test_a_way_is_even_and_stays_on_the_sphere() -> None:
    start, end = torch.randn(2, 5, 10, generator=torch.Generator().manual_seed(0)).double()
    way = slerp(start, end, 7)
    assert torch.allclose(way.square().mean(2), torch.ones(5, 7, dtype=way.dtype))
    unit = way / 10**0.5
    ends = [torch.nn.functional.normalize(z, dim=1) for z in (start, end)]
    assert torch.allclose(unit[:, 0], ends[0])
    assert torch.allclose(unit[:, -1], ends[1])
    steps = (unit[:, 1:] * unit[:, :-1]).sum(2).clamp(-1, 1).acos()
    whole = (ends[0] * ends[1]).sum(1).clamp(-1, 1).acos()
    assert torch.allclose(steps, (whole / 6)[:, None].expand(5, 6))
    # Shoemake's formula, where no angle is near 0 or pi.
    t = torch.linspace(0, 1, 7).double()[:, None]
    angle = whole[:, None, None]
    a, b = (z[:, None] for z in ends)
    plain = (((1 - t) * angle).sin() * a + (t * angle).sin() * b) / angle.sin()
    assert torch.allclose(unit, plain)


def test_a_way_to_itself_stays_and_one_to_the_opposite_goes_round() -> None:
    z = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(slerp(z, z, 4) / 10**0.5, torch.nn.functional.normalize(z)[:, None])
    way = slerp(z, -z, 5)
    assert way.isfinite().all()
    assert torch.allclose(way[:, 0], -way[:, -1], atol=1e-5)
    assert torch.allclose((way[:, 0] * way[:, 2]).sum(1), torch.zeros(3), atol=1e-5)


def test_the_nearest_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cl_ray.report.neighbours.BLOCK", 7)
    random = np.random.default_rng(0)
    bank = random.integers(0, 256, (40, 8, 8, 3), np.uint8)
    asked = np.concatenate([random.integers(0, 256, (5, 8, 8, 3), np.uint8), bank[[31, 3]]])
    found = nearest_pixels(bank, asked, 4)
    flat = [images.reshape(len(images), -1) / 255 for images in (asked, bank)]
    distances = np.linalg.norm(flat[0][:, None] - flat[1], axis=2)
    assert np.array_equal(found.rows, np.argsort(distances, 1)[:, :4])
    assert np.allclose(found.distances, np.sort(distances, 1)[:, :4])
    assert found.distances[5:, 0].tolist() == [0, 0]  # a copy is a copy exactly
    assert nearest_pixels(bank[:2], asked, 4).rows.shape == (7, 2)


def test_copies_among_the_samples_are_seen(trained: Path, digits: str) -> None:
    run, dataset = cl_ray.load(trained), Dataset.open(digits)
    test = dataset.read("test")
    honest = shows.neighbours(run, dataset, test)
    assert honest.whole
    assert honest.bank == 300
    assert honest.samples > 1
    assert honest.floor is not None
    assert honest.nearer is not None

    class Copier:
        """A G that gives training images back."""

        shape = run.shape

        def generate(self, n: int, seed: int) -> np.ndarray:
            rows = np.random.default_rng(seed).integers(0, 300, n)
            return dataset.read("train").image[rows]

    copies = shows.neighbours(Copier(), dataset, test)  # type: ignore[arg-type]
    assert copies.samples == 0
    assert copies.nearer == 1
    assert {sample.label for sample, _ in copies.rows} == {"0.00"}
    nearest = [float(sample.label) for sample, _ in honest.rows]
    assert nearest[:4] == sorted(nearest[:4])
    assert min(nearest[4:]) >= nearest[3]
    assert shows.neighbours(run, dataset, None).floor is None


def test_a_map_keeps_clusters_together() -> None:
    random = np.random.default_rng(0)
    centres = random.normal(size=(3, 100)) * 10
    label = np.repeat([0, 1, 2], 30)
    features = (centres[label] + random.normal(size=(90, 100))).astype(np.float32)
    plane = embedding_map(features)
    assert plane.points.shape == (90, 2)
    assert plane.components.shape == (90, 50)
    assert 0.9 < plane.kept < 1
    away = np.linalg.norm(plane.points[:, None] - plane.points, axis=2) + np.eye(90) * 1e9
    assert (label[away.argmin(1)] == label).all()
    assert np.array_equal(embedding_map(features).points, plane.points)
    assert embedding_map(features[:10]).points.shape == (10, 2)  # as few as there may be


def test_names_on_the_map_stand_whole_and_lie_on_no_other() -> None:
    def group(name: str, x: float, y: float) -> shows.Group:
        return shows.Group(name, "c0", "", 1, *shows.within(name, x, y), True)

    long = group("a long name", 2, 359)
    assert long.x - 11 * shows.LETTER / 2 == 0
    assert long.y + shows.LINE / 2 == shows.PLANE
    assert shows.within("x" * 99, 5, 100) == (shows.PLANE / 2, 100)
    assert shows.cross(group("cat", 100, 100), group("dog", 120, 110))
    assert not shows.cross(group("cat", 100, 100), group("dog", 100, 120))
    assert not shows.cross(group("cat", 100, 100), group("dog", 140, 100))


def test_the_projector_is_given_every_image_with_its_label(
    trained: Path, page: Path, digits: str
) -> None:
    board = trained / "tensorboard"
    index = text_format.Parse((board / "projector_config.pbtxt").read_text(), ProjectorConfig())
    (entry,) = index.embeddings
    assert entry.tensor_name == "discriminator:00030"
    table = np.loadtxt(board / entry.tensor_path, delimiter="\t", ndmin=2)
    assert table.shape == (TEST, 50)
    header, *rows = (board / entry.metadata_path).read_text().splitlines()
    assert header == "id\tlabel"
    truth = Dataset.open(digits).read("test")
    assert truth.label is not None
    labels = dict(zip(truth.id.tolist(), truth.label.tolist(), strict=True))
    said = [tuple(map(int, row.split("\t"))) for row in rows]
    assert dict(said) == labels
    # Distances between the images' features are kept: the components are a turn of them.
    order = [int(np.flatnonzero(truth.id == number)[0]) for number, _ in said]
    features = cl_ray.load(trained).embed(truth.image[order]).astype(float)
    away = [np.linalg.norm(t[:, None] - t, axis=2) for t in (table, features)]
    assert np.corrcoef(away[0].ravel(), away[1].ravel())[0, 1] > 0.99
    sprite = np.asarray(Image.open(board / entry.sprite.image_path))
    assert list(entry.sprite.single_image_dim) == [28, 28]
    assert sprite.shape == (280, 280, 3)  # 10 x 10 for 90
    row, column = divmod(17, 10)
    tile = sprite[row * 28 : row * 28 + 28, column * 28 : column * 28 + 28, :1]
    assert np.abs(tile.astype(int) - truth.image[order[17]]).max() <= 1
    assert len(list(board.glob("events*"))) == 1  # the training's own


def test_embeddings_of_other_steps_stay_to_compare_with(copied: Path) -> None:
    board = copied / "tensorboard"
    for checkpoint in ("step-00000020", "last", "step-00000020"):
        assert write_run_report(copied, checkpoint).projector
    text = (board / "projector_config.pbtxt").read_text()
    index = text_format.Parse(text, ProjectorConfig())
    assert [e.tensor_name for e in index.embeddings] == [
        "discriminator:00020",
        "discriminator:00030",
    ]
    for entry in index.embeddings:
        assert (board / entry.tensor_path).is_file()
    events = len(list(board.glob("*tfevents*")))
    assert events == 1
    before = sorted(p.name for p in board.rglob("*"))
    folder_of(copied).write("report.html", b"")
    assert not write_run_report(copied, projector=False).projector
    assert sorted(p.name for p in board.rglob("*")) == before
