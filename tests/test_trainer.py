"""The loop: interrupted and continued is uninterrupted, on one worker and on several."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from helpers.five_steps import small
from helpers.ranks import together
from helpers.states import alike, pack, unpack

from cl_ray import distributed
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader, StreamingLoader
from cl_ray.data.partition import Partition
from cl_ray.errors import UserError
from cl_ray.gan import ContrastiveGAN, LossTerms
from cl_ray.trainer import Metrics, NonFiniteLossError, StepLog, Trainer

MakeDigits = Callable[[int], str]
KINDS = {"resident": InMemoryLoader, "streaming": StreamingLoader}
IMAGES, STEPS, EPOCHS = 71, 6, 2
"""71 images, 12 a step: 6 steps, the last one short; of two workers, one has a row less."""
INTERRUPTIONS = [(0, 2), (0, STEPS), (1, 0), (1, 4)]
"""Epoch and position: within an epoch, between its last step and its end, and between two."""
COST = ("seconds", "waited", "images_per_second")


def begin(kind: str, data: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Trainer:
    """This rank's run, at its beginning; of a stream's windows, each worker has several."""
    fields["optimizer"] = {"decay": 0.5, **fields.get("optimizer", {})}
    fields = {"epochs": EPOCHS, "shards": {"window": 16}, "log_every": 2, **fields}
    config = small(data=data, **fields)
    rank, workers = distributed.world()
    share = Partition(Dataset.open(data), config, workers, rank)
    return Trainer(config, KINDS[kind].read(share), dtype=dtype)


def losses(metrics: Metrics) -> Metrics:
    """An epoch's metrics without what it cost."""
    assert set(COST) < metrics.keys()
    return {name: figure for name, figure in metrics.items() if name not in COST}


@dataclass
class Whole:
    """An uninterrupted run.

    Args:
        metrics: Of each epoch.
        end: Its packed state after the last.
        stops: (epoch, position) of every moment at which a host may save, and the state then.
    """

    metrics: list[Metrics]
    end: bytes
    stops: dict[tuple[int, int], bytes]


def uninterrupted(run: Trainer) -> Whole:
    stops = {(0, 0): pack(run.state_dict())}

    def watch(record: StepLog) -> None:
        stops[record.epoch, record.position] = pack(run.state_dict())

    metrics = []
    for _ in range(EPOCHS):
        metrics.append(losses(run.train_epoch(watch)))
        stops[run.epochs, 0] = pack(run.state_dict())
    return Whole(metrics, stops[EPOCHS, 0], stops)


def continued(run: Trainer, packed: bytes) -> tuple[list[Metrics], bytes]:
    """The metrics of the epochs that were left, and the state at the end."""
    run.load_state_dict(unpack(packed))
    metrics = [losses(run.train_epoch()) for _ in range(run.epochs, EPOCHS)]
    return metrics, pack(run.state_dict())


@dataclass
class Told:
    """What one rank says of runs of one kind."""

    whole: Whole
    continued: dict[tuple[int, int], tuple[list[Metrics], bytes]]
    from_one_worker: dict[str, Any]


def tell(data: str, of_one_worker: dict[str, bytes]) -> dict[str, Told]:
    """Run, interrupt and continue in a run of its own; both kinds of shard."""
    told = {}
    for kind in KINDS:
        fields = {"pairs": {"mode": "labels"}, "optimizer": {"d_steps": 2}}
        whole = uninterrupted(begin(kind, data, **fields))
        ends = {
            stop: continued(begin(kind, data, **fields), whole.stops[stop])
            for stop in INTERRUPTIONS
        }
        other = begin(kind, data, **fields)
        if of_one_worker:
            other.load_state_dict(unpack(of_one_worker[kind]))
        told[kind] = Told(whole, ends, other.state_dict())
    return told


@pytest.fixture(scope="session")
def data(make_digits: MakeDigits) -> str:
    return make_digits(IMAGES)


@pytest.fixture(scope="module")
def one(data: str) -> dict[str, Told]:
    return tell(data, {})


@pytest.fixture(scope="module")
def two(data: str, one: dict[str, Told]) -> list[dict[str, Told]]:
    return together(tell, 2, data, {kind: one[kind].whole.stops[1, 2] for kind in KINDS})


@pytest.fixture(scope="module", params=[1, 2])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Told]]:
    if request.param == 1:
        return [request.getfixturevalue("one")]
    return request.getfixturevalue("two")


@pytest.mark.parametrize("kind", KINDS)
def test_interrupted_and_continued_is_uninterrupted(
    kind: str, ranks: list[dict[str, Told]]
) -> None:
    for rank in ranks:
        whole = rank[kind].whole
        positions = [(epoch, position) for epoch in range(EPOCHS) for position in (0, 2, 4, 6)]
        assert set(whole.stops) == {*positions, (EPOCHS, 0)}
        for (epoch, _), (metrics, end) in rank[kind].continued.items():
            assert metrics == whole.metrics[epoch:]
            assert alike(unpack(end), unpack(whole.end))
    ends = [unpack(rank[kind].whole.end) for rank in ranks]
    assert all(alike(end, ends[0]) for end in ends[1:])


def test_both_kinds_of_shard_learn_of_other_pairs(one: dict[str, Told]) -> None:
    """Or the tests above would try one kind only."""
    assert not alike(unpack(one["resident"].whole.end), unpack(one["streaming"].whole.end))


def steps_of_epoch(gan: ContrastiveGAN, run: Trainer, epoch: int) -> list[LossTerms]:
    """An epoch's steps one after another, at rates that fall over the run's second half."""
    terms = []
    for position, batch in enumerate(run.shard.batches(epoch)):
        left = STEPS * EPOCHS - STEPS * epoch - position
        gan.set_lr_scale(min(1.0, left / (STEPS * EPOCHS / 2)))
        terms.append(gan.step(batch))
    return terms


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_is_its_batches_one_after_another(kind: str, data: str) -> None:
    run = begin(kind, data, torch.float64, log_every=4)
    records: list[StepLog] = []
    gan = ContrastiveGAN(run.config, (28, 28, 1), dtype=torch.float64)
    for epoch in range(EPOCHS):
        metrics = losses(run.train_epoch(records.append))
        terms = steps_of_epoch(gan, run, epoch)
        assert len(terms) == STEPS
        for name, figure in metrics.items():
            mean = sum(term[name].item() for term in terms) / STEPS
            assert figure == pytest.approx(mean, rel=1e-12)
        for record in records[-2:]:  # of steps 1 to 4, then 5 and 6
            some = terms[:4] if record.position == 4 else terms[4:]
            for name, figure in record.metrics.items():
                mean = sum(term[name].item() for term in some) / len(some)
                assert figure == pytest.approx(mean, rel=1e-12)
    assert alike(gan.state_dict(), run.gan.state_dict())
    where = [(record.epoch, record.position, record.step) for record in records]
    assert where == [(0, 4, 4), (0, 6, 6), (1, 4, 10), (1, 6, 12)]


def test_a_record_comes_before_a_checkpoint_is_due(data: str) -> None:
    """Every 4 steps of the run, not of the epoch."""
    run = begin("resident", data, log_every=100, checkpoint={"every": 4})
    steps: list[int] = []
    for _ in range(EPOCHS):
        run.train_epoch(lambda record: steps.append(record.step))
    assert steps == [4, 6, 8, 12]


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_with_no_step_left_is_a_no_op(kind: str, one: dict[str, Told], data: str) -> None:
    """As after a kill between an epoch's last step and its end."""
    whole = one[kind].whole
    run = begin(kind, data, pairs={"mode": "labels"}, optimizer={"d_steps": 2})
    run.load_state_dict(unpack(whole.stops[0, STEPS]))
    records: list[StepLog] = []
    assert losses(run.train_epoch(records.append)) == whole.metrics[0]
    assert not records
    assert run.batch is None
    assert alike(run.state_dict(), unpack(whole.stops[1, 0]))


@pytest.mark.parametrize("kind", KINDS)
def test_another_number_of_workers_starts_the_epoch_again(
    kind: str, one: dict[str, Told], two: list[dict[str, Told]], data: str
) -> None:
    fields = {"pairs": {"mode": "labels"}, "optimizer": {"d_steps": 2}}
    packed = two[0][kind].whole.stops[1, 4]
    of_two = unpack(packed)
    run = begin(kind, data, **fields)
    run.load_state_dict(unpack(packed))
    assert (run.epochs, run.position) == (1, 0)
    assert alike(run.gan.state_dict(), of_two["gan"])
    # The whole epoch follows, and what was counted of it before is forgotten.
    gan = ContrastiveGAN(run.config, (28, 28, 1))
    gan.load_state_dict(of_two["gan"])
    terms = steps_of_epoch(gan, run, epoch=1)
    metrics = losses(run.train_epoch())
    assert alike(run.gan.state_dict(), gan.state_dict())
    assert run.state_dict()["workers"] == 1
    for name, figure in metrics.items():
        mean = sum(term[name].item() for term in terms) / STEPS
        assert figure == pytest.approx(mean, rel=1e-5)

    of_one = unpack(one[kind].whole.stops[1, 2])
    for rank in two:
        state = rank[kind].from_one_worker
        assert (state["epochs"], state["position"], state["sums"]) == (1, 0, {})
        assert state["workers"] == 2
        assert alike(state["gan"], of_one["gan"])


EXTREME = {"losses": {"adversarial": 1e39}}  # float32 ends at 3.4e38


def complaint(run: Trainer) -> str:
    """What is said when it diverges."""
    with pytest.raises(NonFiniteLossError) as caught:
        run.train_epoch()
    assert isinstance(caught.value, UserError)
    return str(caught.value)


@pytest.mark.parametrize("log_every", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loss_that_is_no_number_is_named_with_its_step(
    kind: str, log_every: int, data: str
) -> None:
    run = begin(kind, data, log_every=log_every, **EXTREME)
    gan = ContrastiveGAN(run.config, (28, 28, 1))
    name, step = next(
        (name, gan.steps)
        for batch in run.shard.batches(0)
        for name, term in gan.step(batch).items()
        if not term.isfinite()
    )
    message = complaint(run)
    assert re.match(rf"{name} became (nan|-?inf) at step {step} \(epoch 1\)", message)
    rates = run.config.optimizer
    for word in (f"lr_g {rates.lr_g:g}", f"lr_d {rates.lr_d:g}", "weight"):
        assert word in message
    assert message.endswith(".")


def test_the_step_is_named_after_epochs_and_a_stop(data: str, one: dict[str, Told]) -> None:
    run = begin("resident", data, log_every=4)
    run.load_state_dict(unpack(one["resident"].whole.stops[1, 2]))
    spoil(run)
    assert re.match(r"\w/\w+ became nan at step 9 \(epoch 2\)", complaint(run))


def spoil(run: Trainer) -> None:
    """As a faulty memory would: one of D's biases is no number any more."""
    with torch.no_grad():
        run.gan.discriminator.score.bias.fill_(torch.nan)


def diverge(data: str) -> list[str]:
    """What this rank says of an extreme weight, and of another rank's faulty memory."""
    extreme = complaint(begin("resident", data, log_every=3, **EXTREME))
    run = begin("resident", data, log_every=1, losses={"contrastive": 0.0})
    if distributed.world()[0] == 1:
        spoil(run)
    return [extreme, complaint(run)]


def test_all_ranks_hear_of_it_at_once(data: str) -> None:
    first, second = together(diverge, 2, data)
    assert first == second
    assert re.match(r"\w/\w+ became (nan|-?inf) at step [123] \(epoch 1\)", first[0])
    # At the first step rank 0's own share is still a number.
    assert re.match(r"d/adversarial became nan at step 1 \(epoch 1\)", first[1])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_larger_than_the_data(kind: str, make_digits: MakeDigits) -> None:
    run = begin(kind, make_digits(10), batch_size=48)
    metrics = losses(run.train_epoch())
    assert run.gan.steps == 1
    assert run.batch is not None
    assert run.batch.present.tolist() == [True] * 10 + [False] * 38
    assert len(run.batch.positive) == len(run.batch.negative) == 48
    assert torch.tensor(list(metrics.values())).isfinite().all()


def test_the_rates_stay_then_fall_in_a_line(make_digits: MakeDigits) -> None:
    optimizer = {"lr_g": 0.004, "lr_d": 0.001, "decay": 0.5}
    run = begin("resident", make_digits(IMAGES), log_every=1, optimizer=optimizer)
    taken = []

    def watch(_: StepLog) -> None:
        networks = run.gan.g_optimizer, run.gan.d_optimizer
        taken.append([network.param_groups[0]["lr"] for network in networks])

    for _ in range(EPOCHS):
        run.train_epoch(watch)
    shares = [1.0] * 7 + [5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
    assert taken == [pytest.approx([0.004 * s, 0.001 * s]) for s in shares]


def test_hard_negatives_are_chosen_by_d_as_it_is(make_digits: MakeDigits) -> None:
    data, hard = make_digits(IMAGES), {"negatives": "hard", "candidates": 8}
    whole, again = (begin("resident", data, pairs=hard, log_every=1) for _ in range(2))
    everything = torch.from_numpy(Dataset.open(data).read("train").image)
    seen: list[tuple[float, float]] = []

    def watch(record: StepLog) -> None:
        if record.step == 3:
            again.load_state_dict(unpack(pack(whole.state_dict())))
        batch, embed = whole.batch, whole.gan.embed
        assert batch is not None
        anchors, everyone = embed(batch.positive), embed(everything)
        chosen = (anchors * embed(batch.negative)).sum(1).mean().item()
        seen.append((chosen, (anchors @ everyone.T).mean().item()))

    whole.epoch(watch)
    assert len(seen) == STEPS
    assert sum(chosen - of_all for chosen, of_all in seen) / STEPS > 0.02
    again.epoch()  # goes on in mid-epoch, to the same end
    assert alike(again.gan.state_dict(), whole.gan.state_dict())


def test_hard_negatives_of_a_stream_are_refused(make_digits: MakeDigits) -> None:
    with pytest.raises(UserError, match=r"pairs.negatives `hard` needs D .* raise shards.memory"):
        begin("streaming", make_digits(IMAGES), pairs={"negatives": "hard"})
