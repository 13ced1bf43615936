"""A rank's batches: each row once an epoch, far negatives, and nothing left to time or chance."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from cl_ray.config import build
from cl_ray.data import writer
from cl_ray.data.dataset import Dataset, RowBatch, RowRange
from cl_ray.data.loaders import InMemoryLoader, PairLoader, StreamingLoader, sample_window_pairs
from cl_ray.data.partition import Partition, row_ranges
from cl_ray.gan import PairBatch

KINDS = {"resident": InMemoryLoader, "streaming": StreamingLoader}
MODES = ["views", "labels"]
COLUMNS = ("positive", "partner", "negative", "present")

SIZES = [  # rows, batch, workers, window, quantile
    (347, 12, 1, 90, 0.3),
    (347, 12, 2, 40, 0.3),
    (347, 12, 3, 50, 0.3),
    (348, 12, 4, 40, 0.3),  # 87 rows each, of which 3 fill a batch up
    (360, 12, 6, 30, 0.1),  # all divides: no batch is short
    (25, 12, 2, 6, 0.01),  # rank 1 has no row left for its last batch
    (13, 32, 2, 100, 0.01),  # not even one whole batch
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Dataset]:
    """Makes data sets of the first so many digits, in row groups of 64 and files of 2 of those."""
    mnist = Dataset.open("mnist")
    rows = mnist.read("train", [RowRange(0, 0, 0, 400)])
    assert rows.label is not None
    pictures = [
        writer.RawImage(image, int(label), "a digit")
        for image, label in zip(rows.image, rows.label, strict=True)
    ]
    made: dict[int, Dataset] = {}

    def make(count: int) -> Dataset:
        if count not in made:
            folder = str(tmp_path_factory.mktemp("data") / "digits")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(writer, "GROUP_BYTES", 1)
                patch.setattr(writer, "GROUPS_PER_SHARD", 2)
                writer.write_splits(
                    {"train": pictures[:count]}, folder, writer.DatasetMetadata("digits", "MNIST")
                )
            made[count] = Dataset.open(folder)
        return made[count]

    return make


def share(
    dataset: Dataset, batch: int = 12, workers: int = 1, rank: int = 0, **fields: Any
) -> Partition:
    fields = {"seed": 3, "pairs": {"candidates": 2}, **fields}
    return Partition(dataset, build({"batch_size": batch, **fields}), workers, rank)


def rows_of(pieces: list[RowRange]) -> list[tuple[int, int, int]]:
    """Each row as its file, row group and place there."""
    return [(p.shard, p.group, row) for p in pieces for row in range(p.start, p.stop)]


def same(ours: list[PairBatch], theirs: list[PairBatch]) -> bool:
    return len(ours) == len(theirs) and all(
        torch.equal(getattr(a, name), getattr(b, name))
        for a, b in zip(ours, theirs, strict=True)
        for name in COLUMNS
    )


class Who:
    """Tells rows by their pixels, and how far apart they are."""

    def __init__(self, dataset: Dataset):
        rows = dataset.read("train")
        assert rows.label is not None
        self.labels = dict(zip(rows.id.tolist(), rows.label.tolist(), strict=True))
        self.ids = {i.tobytes(): int(n) for i, n in zip(rows.image, rows.id, strict=True)}
        assert len(self.ids) == len(rows.id)  # no two digits alike
        self.pixels = {int(n): i / 255.0 for i, n in zip(rows.image, rows.id, strict=True)}

    def are(self, images: torch.Tensor, present: torch.Tensor) -> list[int]:
        return [self.ids[image.numpy().tobytes()] for image in images[present]]

    def distance(self, one: int, other: int) -> float:
        return float(np.linalg.norm(self.pixels[one] - self.pixels[other]))


@pytest.mark.parametrize(("count", "batch", "workers", "window", "quantile"), SIZES)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_each_row_is_a_positive_once_an_epoch_and_its_negative_is_far(
    data: Callable[[int], Dataset],
    kind: str,
    mode: str,
    count: int,
    batch: int,
    workers: int,
    window: int,
    quantile: float,
) -> None:
    dataset = data(count)
    who, least = Who(dataset), dataset.distance_quantile("train", quantile)
    pairs = {"mode": mode, "quantile": quantile, "candidates": 1}
    shares = [
        share(dataset, batch, workers, rank, pairs=pairs, shards={"window": window})
        for rank in range(workers)
    ]
    shards: list[PairLoader] = [KINDS[kind].read(s) for s in shares]
    local = batch // workers
    orders = []
    for epoch in (0, 1):
        positives: list[list[int]] = []
        for shard in shards:
            batches = list(shard.batches(epoch))
            assert len(batches) == shard.partition.steps == shares[0].steps
            assert all(b.present.all() for b in batches[:-1])
            last = batches[-1].present
            assert torch.equal(last, torch.arange(local) < last.sum())
            positives.append([])
            for b in batches:
                for images in (b.positive, b.partner, b.negative):
                    assert images.shape == (local, 28, 28, 1)
                    assert images.dtype == torch.uint8
                ours = who.are(b.positive, b.present)
                partners, negatives = who.are(b.partner, b.present), who.are(b.negative, b.present)
                positives[-1] += ours
                assert all(
                    who.distance(*pair) >= least for pair in zip(ours, negatives, strict=True)
                )
                if mode == "views":
                    assert partners == ours
                else:
                    for one, partner, negative in zip(ours, partners, negatives, strict=True):
                        assert who.labels[partner] == who.labels[one] != who.labels[negative]
        everyone = [n for ours in positives for n in ours]
        assert sorted(everyone) == list(range(count))  # disjoint, and the whole
        sizes = [len(ours) for ours in positives]
        assert max(sizes) - min(sizes) <= 1
        assert max(sizes) == sizes[0]
        assert shares[0].steps == -(-sizes[0] // local)  # no empty step
        orders.append(positives)
    assert orders[0] != orders[1]
    if kind == "resident":  # what is kept is kept
        assert [sorted(o) for o in orders[0]] == [sorted(o) for o in orders[1]]


def test_in_labels_the_partner_is_another_of_the_class(data: Callable[[int], Dataset]) -> None:
    who = Who(data(347))
    ours = share(data(347), pairs={"mode": "labels"}, shards={"window": 30})
    for batch in InMemoryLoader.read(ours).batches(0):
        ours_here, partners = (who.are(i, batch.present) for i in (batch.positive, batch.partner))
        assert all(a != b for a, b in zip(ours_here, partners, strict=True))
    # A row that is alone in its class there is its own partner.
    for number, pieces in enumerate(ours.windows(0)):
        window = sample_window_pairs(ours, ours.dataset.read("train", pieces), 0, number)
        everyone = torch.ones(len(window["id"]), dtype=torch.bool)
        partners = who.are(torch.from_numpy(window["partner"]), everyone)
        classes = [who.labels[n] for n in window["id"].tolist()]
        for one, partner in zip(window["id"].tolist(), partners, strict=True):
            assert (one == partner) == (classes.count(who.labels[one]) == 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_starting_at_a_step_gives_the_tail(
    data: Callable[[int], Dataset], kind: str, mode: str
) -> None:
    """Also where no row is left for the last batch."""
    for count, rank in ((100, 0), (25, 1)):
        window, pairs = 17 if count == 100 else 6, {"mode": mode, "quantile": 0.01, "candidates": 1}
        ours = share(data(count), 12, 2, rank, pairs=pairs, shards={"window": window})
        whole = list(KINDS[kind].read(ours).batches(1))
        assert len(whole) == ours.steps
        shard = KINDS[kind].read(ours)
        for start in range(ours.steps + 1):
            assert same(list(shard.batches(1, start)), whole[start:])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_batches_follow_from_seed_epoch_workers_and_rank(
    data: Callable[[int], Dataset], kind: str, mode: str
) -> None:
    fields: dict[str, Any] = {"pairs": {"mode": mode}, "shards": {"window": 40}}

    def batches(epoch: int = 0, workers: int = 2, rank: int = 0, **more: Any) -> list[PairBatch]:
        ours = share(data(347), workers=workers, rank=rank, **fields, **more)
        return list(KINDS[kind].read(ours).batches(epoch))

    torch.manual_seed(0)
    np.random.seed(0)
    first = batches()
    torch.manual_seed(1)
    np.random.seed(1)
    state = torch.random.get_rng_state()
    assert same(batches(), first)
    assert torch.equal(torch.random.get_rng_state(), state)  # nor does it move others' chance
    shard = KINDS[kind].read(share(data(347), workers=2, **fields))
    later = list(shard.batches(1))  # whatever was asked for before
    assert same(list(shard.batches(0)), first)
    assert same(batches(epoch=1), later)
    others = (later, batches(rank=1), batches(workers=3), batches(seed=4))
    for other in others:
        assert not torch.equal(
            torch.cat([b.positive for b in other])[:60], torch.cat([b.positive for b in first])[:60]
        )
    # The seed decides more than which rows come where: here they all come at once.
    all_at_once = {"pairs": {"mode": mode}, "shards": {"window": 1000}}
    alone = [
        next(KINDS[kind].read(share(data(60), seed=seed, **all_at_once)).batches(0))
        for seed in (3, 4)
    ]
    assert not torch.equal(alone[0].positive, alone[1].positive)
    # Negatives are drawn anew each epoch.
    if kind == "resident":
        who = Who(data(347))
        pairs: list[set[tuple[int, int]]] = [
            {p for b in bs for p in zip(who.are(b.positive, b.present),
                                        who.are(b.negative, b.present), strict=True)}
            for bs in (first, later)
        ]  # fmt: skip
        assert len(pairs[0] & pairs[1]) < len(pairs[0]) / 4


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_arrival_is_forgotten(data: Callable[[int], Dataset], mode: str) -> None:
    ours = share(data(347), workers=2, rank=1, pairs={"mode": mode}, shards={"window": 60})
    rows = ours.dataset.read("train", ours.pieces(0))
    assert rows.label is not None
    mixed = np.random.default_rng(0).permutation(len(rows.id))
    shuffled = RowBatch(rows.id[mixed], rows.image[mixed], rows.label[mixed])
    in_order, out_of_order = (list(InMemoryLoader(ours, r).batches(2)) for r in (rows, shuffled))
    assert same(in_order, out_of_order)
    window, again = (sample_window_pairs(ours, r, epoch=2, window=5) for r in (rows, shuffled))
    assert window.keys() == again.keys() >= {"id", "positive", "negative"}
    assert ("partner" in window) == (mode == "labels")
    for name, column in window.items():
        assert np.array_equal(column, again[name])


def test_shards_of_both_kinds_have_the_rows_of_their_share(data: Callable[[int], Dataset]) -> None:
    dataset = data(347)
    who = Who(dataset)
    for rank in range(3):
        ours = share(dataset, workers=3, rank=rank)
        ids = set(dataset.read("train", ours.pieces(0)).id.tolist())
        for kind in KINDS.values():
            batches = list(kind.read(ours).batches(0))
            for name in ("positive", "negative"):  # negatives come from the share as well
                assert {n for b in batches for n in who.are(getattr(b, name), b.present)} <= ids


def test_pieces_cut_the_whole_among_the_ranks(data: Callable[[int], Dataset]) -> None:
    dataset = data(347)
    whole = sorted(rows_of(dataset.pieces("train")))
    assert len(dataset.pieces("train")) == 6
    for workers in (1, 2, 3, 4, 6):
        for epoch in (0, 1):
            cut = [rows_of(share(dataset, 12, workers, r).pieces(epoch)) for r in range(workers)]
            assert sorted(row for rows in cut for row in rows) == whole
            assert {len(rows) for rows in cut} <= {347 // workers, -(-347 // workers)}
    # Row groups come in an order that the seed and the epoch decide.
    orders = [
        [(p.shard, p.group) for p in share(dataset, seed=seed).pieces(epoch)]
        for seed, epoch in ((3, 0), (3, 1), (4, 0))
    ]
    assert [(p.shard, p.group) for p in share(dataset).pieces(0)] == orders[0]
    assert len({tuple(order) for order in orders}) == 3


def test_windows_lay_the_pieces_out_in_parts_of_about_one_size(
    data: Callable[[int], Dataset],
) -> None:
    for size, workers in ((40, 1), (40, 3), (5, 2), (1000, 2), (58, 6)):
        for rank in range(workers):
            ours = share(data(347), 12, workers, rank, shards={"window": size})
            for epoch in (0, 1):
                windows = ours.windows(epoch)
                assert [r for w in windows for r in rows_of(w)] == rows_of(ours.pieces(epoch))
                rows = [len(rows_of(w)) for w in windows]
                assert max(rows) - min(rows) <= 1
                assert len(rows) == max(1, round(sum(rows) / size))


def test_windows_before_the_start_are_not_read(data: Callable[[int], Dataset]) -> None:
    ours = share(data(347), batch=12, shards={"window": 30})
    ends = np.cumsum([len(rows_of(w)) for w in ours.windows(0)])
    asked: list[int] = []

    def deliver(epoch: int, first: int) -> Iterator[dict[str, np.ndarray]]:
        asked.append(first)
        for number in range(first, len(ends)):
            rows = ours.dataset.read("train", ours.windows(epoch)[number])
            yield sample_window_pairs(ours, rows, epoch, number)

    whole = list(StreamingLoader.read(ours).batches(0))
    assert ends[4] == 12 * 12  # where a step begins with a window
    for start in (0, 1, 5, 12, 28):
        assert same(list(StreamingLoader(ours, deliver).batches(0, start)), whole[start:])
        assert asked[-1] == np.searchsorted(ends, start * 12, side="right")


def test_run_of_rows_is_a_slice_of_all_rows() -> None:
    pieces = [
        RowRange(0, 1, 0, 4),
        RowRange(0, 0, 2, 3),
        RowRange(1, 0, 5, 9),
        RowRange(2, 2, 0, 1),
    ]
    everything = rows_of(pieces)
    for first in range(11):
        for end in range(first, 11):
            run = row_ranges(pieces, first, end)
            assert rows_of(run) == everything[first:end]
            assert all(piece.start < piece.stop for piece in run)
    for a, b in pairwise(range(0, 11, 5)):
        assert len(rows_of(row_ranges(pieces, a, b))) == 5


def test_a_share_stays_on_the_device_up_to_the_memory_that_is_given(
    data: Callable[[int], Dataset],
) -> None:
    """The largest rank's pixels decide, so that all ranks decide alike."""
    dataset = data(347)
    largest = 174 * 28 * 28 / 1e9
    for rank in (0, 1):
        at, below = (
            share(dataset, 12, 2, rank, shards={"memory": m}) for m in (largest, largest * 0.999)
        )
        assert at.gigabytes == pytest.approx(largest)
        assert at.resident
        assert not below.resident
