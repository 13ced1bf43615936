"""The training loop: resumed equals uninterrupted, on one worker and on two."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.five_steps import SHAPE, small_config
from helpers.ranks import run_on_ranks
from helpers.run_folder import SMALL_NETWORK, build_trainer, save_run
from helpers.states import pack, states_equal, unpack

from cl_ray import distributed
from cl_ray.batch import Losses, PairBatch
from cl_ray.checkpoint import CheckpointStore
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader, StreamingLoader
from cl_ray.data.partition import Partition
from cl_ray.errors import UserError
from cl_ray.gan import ContrastiveGAN
from cl_ray.step_log import Metrics, NonFiniteLossError, StepLog
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer

MakeDigits = Callable[[int], str]
LOADERS: dict[str, type[InMemoryLoader] | type[StreamingLoader]] = {
    "in memory": InMemoryLoader,
    "streaming": StreamingLoader,
}
IMAGES, STEPS, EPOCHS = 71, 6, 2
"""71 images, 12 a step: 6 steps, the last one short; of two workers, one has a row less."""
INTERRUPTIONS = [(0, 2), (0, STEPS), (1, 0), (1, 4)]
"""Epoch and position: within an epoch, between its last step and its end, and between two."""
LR_SCALES = [1 / 3, 2 / 3, 1, 1, 1, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6]
RESUMED: dict[str, Any] = {"pairs": {"mode": "labels"}, "optimizer": {"d_steps": 2}}
OVERFLOW: dict[str, Any] = {"losses": {"adversarial": 1e39}}  # float32 ends at 3.4e38


def build(loader: str, data: str, dtype: torch.dtype = torch.float32, **fields: Any) -> Trainer:
    """Build this rank's trainer; a streaming worker has several windows."""
    rates = {"lr_warmup_fraction": 0.25, "lr_decay_fraction": 0.5}
    optimizer = rates | fields.pop("optimizer", {})
    fields = {"epochs": EPOCHS, "shards": {"window": 16}, "log_every": 2, **fields}
    config = small_config(data=data, optimizer=optimizer, **fields)
    rank, workers = distributed.world()
    partition = Partition(Dataset.open(data), config, workers, rank)
    return Trainer(config, LOADERS[loader].read(partition), dtype=dtype)


def losses(metrics: Metrics) -> Metrics:
    """Return an epoch's metrics without times."""
    times = {"seconds", "data_time_fraction", "images_per_second"}
    assert times < metrics.keys()
    return {name: value for name, value in metrics.items() if name not in times}


def mean(steps: list[Losses], name: str) -> float:
    return sum(step[name].item() for step in steps) / len(steps)


@dataclass
class Run:
    """An uninterrupted run.

    Args:
        metrics: Of each epoch.
        end: Its packed final state.
        states: Packed state at each (epoch, position) at which a host may save.
    """

    metrics: list[Metrics]
    end: bytes
    states: dict[tuple[int, int], bytes]


def train(trainer: Trainer) -> Run:
    states = {(0, 0): pack(trainer.state_dict())}

    def on_log(log: StepLog) -> None:
        states[log.epoch, log.position] = pack(trainer.state_dict())

    metrics = []
    for _ in range(EPOCHS):
        metrics.append(losses(trainer.train_epoch(on_log)))
        states[trainer.epochs, 0] = pack(trainer.state_dict())
    return Run(metrics, states[EPOCHS, 0], states)


def resume(trainer: Trainer, packed: bytes) -> tuple[list[Metrics], bytes]:
    """Return the metrics of the remaining epochs, and the packed final state."""
    trainer.load_state_dict(unpack(packed))
    metrics = [losses(trainer.train_epoch()) for _ in range(trainer.epochs, EPOCHS)]
    return metrics, pack(trainer.state_dict())


@dataclass
class RankRuns:
    """One rank's runs with one kind of loader; `from_one_worker` is the state after loading."""

    whole: Run
    resumed: dict[tuple[int, int], tuple[list[Metrics], bytes]]
    from_one_worker: dict[str, Any]


def run_on_rank(data: str, of_one_worker: dict[str, bytes]) -> dict[str, RankRuns]:
    """Train, and resume from each interruption in a new trainer; with each kind of loader."""
    runs = {}
    for loader in LOADERS:
        whole = train(build(loader, data, **RESUMED))
        resumed = {
            stop: resume(build(loader, data, **RESUMED), whole.states[stop])
            for stop in INTERRUPTIONS
        }
        other = build(loader, data, **RESUMED)
        if of_one_worker:
            other.load_state_dict(unpack(of_one_worker[loader]))
        runs[loader] = RankRuns(whole, resumed, other.state_dict())
    return runs


@pytest.fixture(scope="session")
def data(make_digits: MakeDigits) -> str:
    return make_digits(IMAGES)


@pytest.fixture(scope="module")
def one(data: str) -> dict[str, RankRuns]:
    return run_on_rank(data, {})


@pytest.fixture(scope="module")
def two(data: str, one: dict[str, RankRuns]) -> list[dict[str, RankRuns]]:
    states = {loader: one[loader].whole.states[1, 2] for loader in LOADERS}
    return run_on_ranks(run_on_rank, 2, data, states)


@pytest.mark.parametrize("workers", ["one", "two"])
@pytest.mark.parametrize("loader", LOADERS)
def test_resumed_equals_uninterrupted(
    loader: str, workers: str, request: pytest.FixtureRequest
) -> None:
    result = request.getfixturevalue(workers)
    ranks = [rank[loader] for rank in (result if workers == "two" else [result])]
    for runs in ranks:
        positions = [(epoch, position) for epoch in range(EPOCHS) for position in (0, 2, 4, 6)]
        assert set(runs.whole.states) == {*positions, (EPOCHS, 0)}
        for (epoch, _), (metrics, end) in runs.resumed.items():
            assert metrics == runs.whole.metrics[epoch:]
            assert states_equal(unpack(end), unpack(runs.whole.end))
        end, first = unpack(runs.whole.end), unpack(ranks[0].whole.end)
        if runs is not ranks[0]:  # the prior is fitted by rank 0 alone
            assert first.pop("prior") is not None
            assert end.pop("prior") is None
        assert states_equal(end, first)


def test_loaders_differ_in_their_pairs(one: dict[str, RankRuns]) -> None:
    """Otherwise the tests above would try one loader only."""
    in_memory, streaming = (unpack(one[loader].whole.end) for loader in LOADERS)
    assert not states_equal(in_memory, streaming)


def train_by_hand(gan: ContrastiveGAN, trainer: Trainer, epoch: int) -> list[Losses]:
    """Take an epoch's steps, at learning rates that rise at first, and decay in the second half."""
    steps = []
    for position, batch in enumerate(trainer.loader.batches(epoch)):
        gan.set_lr_scale(LR_SCALES[STEPS * epoch + position])
        steps.append(gan.train_step(batch))
    assert len(steps) == STEPS
    return steps


@pytest.mark.parametrize("loader", LOADERS)
def test_an_epoch_is_its_batches_in_order(loader: str, data: str) -> None:
    trainer = build(loader, data, torch.float64, log_every=4)
    logs: list[StepLog] = []
    gan = ContrastiveGAN(trainer.config, SHAPE, dtype=torch.float64)
    for epoch in range(EPOCHS):
        metrics = losses(trainer.train_epoch(logs.append))
        steps = train_by_hand(gan, trainer, epoch)
        logged = [(metrics, steps), (logs[-2].metrics, steps[:4]), (logs[-1].metrics, steps[4:])]
        for means, of_steps in logged:
            for name, value in means.items():
                assert value == pytest.approx(mean(of_steps, name), rel=1e-12)
    assert states_equal(gan.state_dict(), trainer.gan.state_dict())
    places = [(log.epoch, log.position, log.step) for log in logs]
    assert places == [(0, 4, 4), (0, 6, 6), (1, 4, 10), (1, 6, 12)]
    assert [log.images for log in logs] == [48, 23, 48, 23]


def test_times_of_logs_and_epoch(data: str) -> None:
    trainer = build("in memory", data)
    logs: list[StepLog] = []
    metrics = trainer.train_epoch(logs.append)
    assert all(0 < log.data_time < log.seconds for log in logs)
    assert sum(log.seconds for log in logs) <= metrics["seconds"]
    data_time = sum(log.data_time for log in logs)
    assert metrics["data_time_fraction"] * metrics["seconds"] == pytest.approx(data_time)
    assert metrics["images_per_second"] * metrics["seconds"] == pytest.approx(IMAGES)


def test_log_comes_before_a_checkpoint_is_due(data: str) -> None:
    """Every 4 steps of the run, not of the epoch."""
    trainer = build("in memory", data, log_every=100, checkpoint={"every": 4})
    steps: list[int] = []
    for _ in range(EPOCHS):
        trainer.train_epoch(lambda log: steps.append(log.step))
    assert steps == [4, 6, 8, 12]


@pytest.mark.parametrize("loader", LOADERS)
def test_epoch_without_steps_left_takes_none(
    loader: str, one: dict[str, RankRuns], data: str
) -> None:
    """As after a kill between an epoch's last step and its end."""
    whole = one[loader].whole
    trainer = build(loader, data, **RESUMED)
    trainer.load_state_dict(unpack(whole.states[0, STEPS]))
    logs: list[StepLog] = []
    assert losses(trainer.train_epoch(logs.append)) == whole.metrics[0]
    assert not logs
    assert trainer.preview_batch is None
    assert states_equal(trainer.state_dict(), unpack(whole.states[1, 0]))


def test_a_run_without_a_fitted_prior_resumes_from_its_checkpoint(
    data: str, tmp_path: Path
) -> None:
    fields = {"generator": {**SMALL_NETWORK, "prior_codes": 0}, "epochs": 2}
    whole, resumed = build_trainer(data, **fields), build_trainer(data, **fields)
    whole.train_epoch()
    checkpoints = CheckpointStore(*RunStorage.from_uri(save_run(whole, tmp_path, step=1)).open())
    resumed.load_state_dict(checkpoints.load("step-00000001"))
    for trainer in (whole, resumed):
        trainer.train_epoch()
    assert states_equal(whole.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("loader", LOADERS)
def test_other_number_of_workers_restarts_the_epoch(
    loader: str, one: dict[str, RankRuns], two: list[dict[str, RankRuns]], data: str
) -> None:
    packed = two[0][loader].whole.states[1, 4]
    trainer = build(loader, data, **RESUMED)
    trainer.load_state_dict(unpack(packed))
    assert (trainer.epochs, trainer.position) == (1, 0)
    gan = ContrastiveGAN(trainer.config, SHAPE)
    gan.load_state_dict(unpack(packed)["gan"])
    assert states_equal(trainer.gan.state_dict(), gan.state_dict())
    # The whole epoch follows; its first part on two workers is not counted.
    steps = train_by_hand(gan, trainer, epoch=1)
    metrics = losses(trainer.train_epoch())
    assert states_equal(trainer.gan.state_dict(), gan.state_dict())
    for name, value in metrics.items():
        assert value == pytest.approx(mean(steps, name), rel=1e-5)
    of_one = unpack(one[loader].whole.states[1, 2])
    for rank in two:
        state = rank[loader].from_one_worker
        assert (state["epochs"], state["position"], state["sums"]) == (1, 0, {})
        assert state["workers"] == 2
        assert states_equal(state["gan"], of_one["gan"])


def error_of(trainer: Trainer) -> str:
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train_epoch()
    assert isinstance(caught.value, UserError)
    return str(caught.value)


def set_nan(trainer: Trainer) -> None:
    """Set one of D's biases to NaN."""
    with torch.no_grad():
        trainer.gan.discriminator.score.bias.fill_(torch.nan)


@pytest.mark.parametrize("log_every", [1, 4])
def test_nan_or_inf_loss_is_named_with_its_step(log_every: int, data: str) -> None:
    trainer = build("in memory", data, log_every=log_every, **OVERFLOW)
    gan = ContrastiveGAN(trainer.config, SHAPE)
    name, step = next(
        (name, gan.steps)
        for batch in trainer.loader.batches(0)
        for name, value in gan.train_step(batch).items()
        if not value.isfinite()
    )
    message = error_of(trainer)
    assert re.match(rf"{name} became (nan|-?inf) at step {step} \(epoch 1\)", message)
    adam = trainer.config.optimizer
    for part in (f"lr_g {adam.lr_g:g}", f"lr_d {adam.lr_d:g}", "weight"):
        assert part in message
    assert message.endswith(".")


def test_weights_that_are_not_finite_are_not_saved(
    data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses of the step that broke them were finite."""
    trainer, step = build("in memory", data), ContrastiveGAN.train_step

    def train_step(gan: ContrastiveGAN, batch: PairBatch) -> Losses:
        losses = step(gan, batch)
        if gan.steps == STEPS:
            set_nan(trainer)
        return losses

    monkeypatch.setattr(ContrastiveGAN, "train_step", train_step)
    assert error_of(trainer).startswith(f"Weights became NaN or Inf by step {STEPS} (epoch 1): ")


def test_step_of_nan_counts_from_the_start_of_the_run(data: str, one: dict[str, RankRuns]) -> None:
    trainer = build("in memory", data, log_every=4)
    trainer.load_state_dict(unpack(one["in memory"].whole.states[1, 2]))
    set_nan(trainer)
    assert re.match(r"\w/\w+ became nan at step 9 \(epoch 2\)", error_of(trainer))


def diverge(data: str) -> list[str]:
    """Return this rank's errors after an overflow, and after a NaN on rank 1 only."""
    overflow = error_of(build("in memory", data, log_every=3, **OVERFLOW))
    trainer = build("in memory", data, log_every=1, losses={"contrastive": 0.0})
    if distributed.world()[0] == 1:
        set_nan(trainer)
    return [overflow, error_of(trainer)]


def test_all_ranks_raise_at_once(data: str) -> None:
    first, second = run_on_ranks(diverge, 2, data)
    assert first == second
    assert re.match(r"\w/\w+ became (nan|-?inf) at step [123] \(epoch 1\)", first[0])
    # At the first step rank 0's own part is still finite.
    assert re.match(r"d/adversarial became nan at step 1 \(epoch 1\)", first[1])


@pytest.mark.parametrize("loader", LOADERS)
def test_batch_larger_than_the_data(loader: str, make_digits: MakeDigits) -> None:
    trainer = build(loader, make_digits(10), batch_size=48)
    metrics = losses(trainer.train_epoch())
    assert trainer.gan.steps == 1
    assert trainer.preview_batch is not None
    assert trainer.preview_batch.present.tolist() == [[True] * 10 + [False] * 38]
    assert len(trainer.preview_batch.positive) == len(trainer.preview_batch.negative) == 48
    assert torch.tensor(list(metrics.values())).isfinite().all()


def test_learning_rates_rise_stay_and_decay_linearly(data: str) -> None:
    optimizer = {"lr_g": 0.004, "lr_d": 0.001}
    trainer = build("in memory", data, log_every=1, optimizer=optimizer)
    rates = []

    def on_log(_: StepLog) -> None:
        optimizers = trainer.gan.g_optimizer, trainer.gan.d_optimizer
        states = [optimizer.state_dict() for optimizer in optimizers]
        of_parts = [{part["param_groups"][0]["lr"] for part in state.values()} for state in states]
        rates.append([rate for (rate,) in of_parts])  # Muon and Adam have the same

    for _ in range(EPOCHS):
        trainer.train_epoch(on_log)
    assert rates == [pytest.approx([0.004 * s, 0.001 * s]) for s in LR_SCALES]


def test_hard_negatives_are_chosen_by_the_current_discriminator(data: str) -> None:
    hard = {"negatives": "hard", "candidates": 8}
    whole, resumed = (build("in memory", data, pairs=hard, log_every=1) for _ in range(2))
    all_images = torch.from_numpy(Dataset.open(data).read("train").image)
    excess: list[float] = []

    def on_log(log: StepLog) -> None:
        if log.step == 3:
            resumed.load_state_dict(unpack(pack(whole.state_dict())))
        batch, embed = whole.preview_batch, whole.gan.embed
        assert batch is not None
        anchors = embed(batch.positive)
        chosen = (anchors * embed(batch.negative)).sum(1).mean()
        excess.append((chosen - (anchors @ embed(all_images).T).mean()).item())

    whole.train_epoch(on_log)
    assert len(excess) == STEPS
    assert sum(excess) / STEPS > 0.02
    resumed.train_epoch()  # from the middle of the epoch
    assert states_equal(resumed.gan.state_dict(), whole.gan.state_dict())


def test_hard_negatives_need_all_images_in_memory(data: str) -> None:
    with pytest.raises(UserError, match=r"pairs.negatives `hard` needs .* shards.memory: raise it"):
        build("streaming", data, pairs={"negatives": "hard"})
