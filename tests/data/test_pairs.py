"""Negatives: far enough, another image, the farthest of the candidates, and never a hang."""

from typing import Any

import pytest
import torch
from helpers.datasets import labels_of
from helpers.refusal import error_of
from torch import Tensor

from cl_ray.data.config import PairConfig
from cl_ray.data.dataset import UNLABELLED, Dataset, RowRange
from cl_ray.data.pairs import PairSampler

MODES = ["views", "labels"]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixel(*values: int) -> Tensor:
    """Images of one pixel: their distances are those of its values."""
    return torch.tensor(values, dtype=torch.uint8)[:, None, None, None]


def sampler(images: Tensor, labels: Tensor | None, distance: float, **config: Any) -> PairSampler:
    return PairSampler(PairConfig(**config), images, labels, distance)


def refusal(*arguments: Any, **config: Any) -> str:
    """The error of a pool without pairs, when it is built or when it is sampled."""

    def pair() -> None:
        made = sampler(*arguments, **config)
        made.sample(torch.arange(len(made.images)), seeded())

    return error_of(pair)


@pytest.fixture(scope="module")
def digits() -> tuple[Dataset, Tensor, Tensor]:
    """300 of the packaged digits."""
    data = Dataset.open("mnist")
    rows = data.read("train", [RowRange(0, 0, 0, 300)])
    return data, torch.from_numpy(rows.image), torch.from_numpy(labels_of(rows))


@pytest.mark.parametrize(("quantile", "candidates"), [(0.1, 2), (0.5, 1), (0.9, 2), (0.9, 8)])
@pytest.mark.parametrize("mode", MODES)
def test_digits_are_paired_as_asked(
    digits: tuple[Dataset, Tensor, Tensor], mode: str, quantile: float, candidates: int
) -> None:
    data, images, labels = digits
    least = data.distance_quantile("train", quantile)
    made = sampler(images, labels, least, mode=mode, quantile=quantile, candidates=candidates)
    # At a quantile of 0.9, ones have no such negative: see test_a_bound_that_one_cannot_meet.
    pixels = images.flatten(1).double() / 255
    distance = pixels.square().sum(1)[:, None] + pixels.square().sum(1) - 2 * pixels @ pixels.T
    within = distance.clamp(min=0).sqrt() >= least + 1e-6
    if mode == "labels":
        within &= labels[:, None] != labels
    positives = within.any(1).nonzero().squeeze(1)
    assert len(positives) > 250
    partners, negatives = made.sample(positives, seeded())
    assert (negatives != positives).all()
    apart = [(pixels[p] - pixels[n]).norm() for p, n in zip(positives, negatives, strict=True)]
    assert min(apart) >= least - 1e-12
    if mode == "views":
        assert torch.equal(partners, positives)
    else:
        assert (labels[negatives] != labels[positives]).all()
        assert (labels[partners] == labels[positives]).all()
        assert (partners != positives).all()


@pytest.mark.parametrize("mode", MODES)
def test_samples_follow_from_their_generator(mode: str) -> None:
    images = torch.randint(0, 256, (50, 3, 3, 1), generator=seeded(), dtype=torch.uint8)
    labels = torch.arange(50) % 4
    distance = 1.2  # of about 1.2 on average: some are drawn again, some sought out
    made = sampler(images, labels, distance, mode=mode, candidates=2)
    again = sampler(images.clone(), labels.clone(), distance, mode=mode, candidates=2)
    positives = torch.randperm(50, generator=seeded())
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    first = made.sample(positives, seeded(5))
    assert torch.equal(torch.random.get_rng_state(), state)
    made.sample(positives, seeded(6))
    torch.manual_seed(2)
    for other in (made.sample(positives, seeded(5)), again.sample(positives, seeded(5))):
        assert torch.equal(first[0], other[0])
        assert torch.equal(first[1], other[1])
    other = made.sample(positives, seeded(6))
    assert not torch.equal(first[1], other[1])
    if mode == "labels":
        assert not torch.equal(first[0], other[0])
    generator = seeded(5)
    made.sample(positives, generator)
    assert not torch.equal(first[1], made.sample(positives, generator)[1])


@pytest.mark.parametrize("candidates", [1, 2, 4, 16])
def test_the_farthest_of_its_candidates_is_taken(candidates: int) -> None:
    """Of k draws from 0 ... 1, the largest is k / (k + 1) on average, with a known spread."""
    line = pixel(*range(256))
    made = sampler(line, None, 1e-6, candidates=candidates)
    positives = torch.zeros(20000, dtype=torch.long)  # the darkest: a negative is its distance
    negatives = made.sample(positives, seeded())[1].double()
    mean = (negatives / 256).mean().item()
    k = candidates
    spread = (k / ((k + 1) ** 2 * (k + 2)) / len(positives)) ** 0.5
    assert mean == pytest.approx(k / (k + 1), abs=5 * spread + 1 / 256)


@pytest.mark.parametrize("mode", MODES)
def test_all_allowed_images_are_sampled_equally(mode: str) -> None:
    """One candidate and no bound to speak of: any other image, in `labels` of another class."""
    images, labels = pixel(*range(10, 130, 10)), torch.tensor([0, 1, 2] * 4)
    made = sampler(images, labels, 1e-6, mode=mode, candidates=1)
    draws = 6000
    partners, negatives = made.sample(torch.full((draws,), 4), seeded())
    counts = torch.bincount(negatives, minlength=12).tolist()
    others = [i for i in range(12) if (i % 3 != 1 if mode == "labels" else i != 4)]
    for i in range(12):
        expected = draws / len(others) if i in others else 0
        assert counts[i] == pytest.approx(expected, abs=5 * expected**0.5)
    if mode == "labels":
        counts = torch.bincount(partners, minlength=12).tolist()
        for i in range(12):
            expected = draws / 3 if i in (1, 7, 10) else 0
            assert counts[i] == pytest.approx(expected, abs=5 * expected**0.5)


def test_an_image_alone_in_its_class_is_its_own_partner() -> None:
    images, labels = pixel(0, 60, 120, 180, 240), torch.tensor([7, 7, 3, 7, 7])
    made = sampler(images, labels, 0.1, mode="labels", candidates=2)
    partners, negatives = made.sample(torch.tensor([2, 0]), seeded())
    assert partners[0] == 2
    assert partners[1] in (1, 3, 4)
    assert negatives[1] == 2


@pytest.mark.parametrize("mode", MODES)
def test_the_only_far_image_is_found(mode: str) -> None:
    """400 images alike and one far off, hardly ever drawn: an exhaustive search finds it."""
    images = pixel(*[10] * 200, 255, *[10] * 200)
    labels = torch.zeros(401, dtype=torch.long)
    labels[200] = 1
    made = sampler(images, labels, 0.9, mode=mode, candidates=1)
    positives = torch.tensor([0, 3, 199, 201, 400])
    assert made.sample(positives, seeded())[1].tolist() == [200] * 5
    assert made.sample(torch.tensor([200]), seeded())[1] != 200
    images = pixel(*[0] * 9001)  # more than are compared at once
    images[8999] = 255
    made = sampler(images, None, 0.5, candidates=1)
    assert made.sample(torch.tensor([5]), seeded())[1].tolist() == [8999]


def test_the_bound_is_exact() -> None:
    """100 / 255 away is allowed at a bound just below, and refused at one just above."""
    images = pixel(0, 100, 99)
    below, above = 100 / 255 - 1e-9, 100 / 255 + 1e-6
    made = sampler(images, None, below, candidates=1)
    assert (made.sample(torch.zeros(50, dtype=torch.long), seeded())[1] == 1).all()
    assert "farthest is at 0.39" in refusal(images, None, above, candidates=1)
    largest = torch.zeros(3, 64, 64, 3, dtype=torch.uint8)  # whose distances do not overflow
    largest[1], largest[2] = 255, 254
    made = sampler(largest, None, 110.8, candidates=2)  # of sqrt(64 * 64 * 3) = 110.85
    assert (made.sample(torch.zeros(20, dtype=torch.long), seeded())[1] == 1).all()


THREE = pixel(0, 100, 200)


@pytest.mark.parametrize(
    ("arguments", "config", "words"),
    [
        ((pixel(*[9] * 20), None, 0.0), {}, ["alike"]),
        ((pixel(*[9] * 20), None, 0.1), {}, ["lower"]),  # as one shard of a dataset may be
        ((THREE, torch.tensor([4, 4, 4]), 0.1), {"mode": "labels"}, ["two classes", "class 4"]),
        ((THREE, None, 0.1), {"mode": "labels"}, ["labels", "none", "views"]),
        # What is far enough but of the same class does not help.
        (
            (pixel(0, 255, 0, 1), torch.tensor([0, 0, 1, 1]), 0.5),
            {"mode": "labels", "candidates": 1},
            ["lower"],
        ),
        *(
            ((pixel(*range(n)), None, 0.001), {"candidates": 5}, ["candidates 5", f"the {n} "])
            for n in (1, 4, 5)
        ),
    ],
)
def test_pools_without_pairs_are_refused(
    arguments: tuple[Any, ...], config: dict[str, Any], words: list[str]
) -> None:
    message = refusal(*arguments, **config)
    assert all(word in message for word in words)


@pytest.mark.parametrize("mode", MODES)
def test_a_bound_that_one_cannot_meet(mode: str) -> None:
    """Black and white lie far apart, grey far from neither: it is named, and nothing hangs."""
    images = pixel(*[0, 255] * 10, 128)
    labels = torch.tensor([0, 1] * 10 + [2])
    made = sampler(images, labels, 0.9, mode=mode, candidates=2)
    made.sample(torch.arange(20), seeded())
    message = refusal(images, labels, 0.9, mode=mode, candidates=2, quantile=0.3)
    for word in ("Image 20 of", "21", "0.90", "pairs.quantile 0.3", "0.50", "lower"):
        assert word in message


def embed_by_angle(images: Tensor) -> Tensor:
    """A unit embedding unrelated to the distance of pixels: an angle for each image."""
    angle = images.flatten(1).double().mul(torch.arange(784) % 7).sum(1) / 100
    return torch.stack([angle.cos(), angle.sin()], 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_hard_negative_is_the_most_similar_of_those_far_enough(
    digits: tuple[Dataset, Tensor, Tensor], mode: str
) -> None:
    data, images, labels = digits
    least = data.distance_quantile("train", 0.5)
    made = sampler(images, labels, least, mode=mode, candidates=299, negatives="hard")
    made.embed = embed_by_angle
    # So many candidates are drawn with repetition: most of all images are among them.
    positives = torch.arange(0, 300, 3)
    _, negatives = made.sample(positives, seeded())
    pixels, embedded = images.flatten(1).double() / 255, embed_by_angle(images)
    similarity = embedded[positives] @ embedded.T
    allowed = torch.cdist(pixels[positives], pixels) >= least
    if mode == "labels":
        allowed &= labels[positives][:, None] != labels
    assert allowed[torch.arange(100), negatives].all()
    better = (similarity > similarity.gather(1, negatives[:, None]) + 1e-12) & allowed
    assert better.sum(1).double().mean() < 3  # of some 150: those that were not drawn
    far = sampler(images, labels, least, mode=mode, candidates=299)
    _, farthest = far.sample(positives, seeded())
    ours = similarity.gather(1, negatives[:, None]).mean()
    assert ours > similarity.gather(1, farthest[:, None]).mean() + 0.3


def test_distances_of_large_images_are_those_of_every_second_pixel() -> None:
    images = torch.zeros(4, 128, 128, 1, dtype=torch.uint8)
    images[1, 1::2] = 255  # differs in rows that do not count
    images[2, ::2] = 255
    images[3, ::2] = 255
    pool = sampler(images, None, 1.0)
    _, negatives = pool.sample(torch.tensor([0, 1]), seeded())
    assert set(negatives.tolist()) <= {2, 3}
    assert refusal(images[:2].repeat(2, 1, 1, 1), None, 1.0)


def test_unlabelled_images_pair_by_views(digits: tuple[Dataset, Tensor, Tensor]) -> None:
    """Labelled ones have the same partners as without the others, and labelled negatives."""
    data, images, labels = digits
    known = torch.arange(300) % 3 > 0
    some = torch.where(known, labels, UNLABELLED)
    least = data.distance_quantile("train", 0.1)
    made = sampler(images, some, least, mode="labels")
    alone = sampler(images[known], labels[known], least, mode="labels")
    rows = known.nonzero().squeeze(1)
    partners, negatives = made.sample(rows, seeded())
    expected, _ = alone.sample(torch.arange(len(rows)), seeded())
    assert torch.equal(partners, rows[expected])
    assert known[negatives].all()
    assert (labels[negatives] != labels[rows]).all()
    assert len(negatives.unique()) > 80
    others = (~known).nonzero().squeeze(1)
    partners, negatives = made.sample(others, seeded())
    assert torch.equal(partners, others)
    assert (negatives != others).all()
    assert 0.1 < known[negatives].float().mean() < 0.9
    # Of one that no candidate is far enough from, by the search of all images.
    strict = sampler(images, some, data.distance_quantile("train", 0.95), mode="labels")
    partner_of = [strict._exhaustive_negative(int(row), seeded()) for row in rows[:20]]
    assert known[partner_of].all()
    assert (labels[partner_of] != labels[rows[:20]]).all()


def test_pool_without_labels_pairs_by_views(digits: tuple[Dataset, Tensor, Tensor]) -> None:
    _, images, labels = digits
    none = torch.full_like(labels, UNLABELLED)
    found = sampler(images, none, 1.0, mode="labels").sample(torch.arange(300), seeded())
    expected = sampler(images, None, 1.0, mode="views").sample(torch.arange(300), seeded())
    assert all(map(torch.equal, found, expected))
    none[7] = 3  # and so does a pool of one known class
    found = sampler(images, none, 1.0, mode="labels").sample(torch.arange(300), seeded())
    assert all(map(torch.equal, found, expected))


def test_negative_of_the_only_labelled_image_nearby_has_no_label() -> None:
    """A window of few labelled images may have none that is far enough."""
    images = torch.zeros(6, 28, 28, 1, dtype=torch.uint8)
    images[2:] = 255
    labels = torch.tensor([0, 1, *[UNLABELLED] * 4])
    for seed in range(5):
        pool = sampler(images, labels, 1.0, mode="labels")
        _, negatives = pool.sample(torch.tensor([0, 1]), torch.Generator().manual_seed(seed))
        assert (negatives > 1).all()
