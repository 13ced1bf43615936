"""One trial in this process: the class that Ray Tune calls, on real digits."""

import math
import socket
import weakref
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.hparams import NUMBER, TEXT, hparams_tab, record_tags
from helpers.limits import file_size_limit
from helpers.small_search import CONFIG, FRECHET, SPACE
from helpers.states import states_equal

import cl_ray
from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import Config, build_config, merge, preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.storage import LEASE_FILE, LeaseLostError, RunStorage
from cl_ray.trainer import Trainer
from cl_ray.training.resources import WorkerResources
from cl_ray.tuning.space import Space
from cl_ray.tuning.trial import ERROR_FILE, LocalTrial, TrialContext

EPOCHS = 3


def start(folder: Path, data: str, values: dict[str, Any], **context: Any) -> LocalTrial:
    """Set a trial up as Ray Tune does, without Ray, and start it."""
    trial = set_up(folder, data, values, **context)
    trial.ensure_started()
    return trial


@lru_cache
def shared(data: str) -> tuple[Config, Dataset, Evaluator]:
    """What all trials on some data have in common."""
    fields = {**yaml.safe_load(CONFIG), "epochs": EPOCHS, "checkpoint": {"keep": 2}}
    base = build_config(merge(preset("quick").model_dump(), fields))
    dataset = Dataset.open(data)
    return base, dataset, Evaluator(dataset, base.evaluation, seed=base.seed)


def set_up(folder: Path, data: str, values: dict[str, Any], /, **context: Any) -> LocalTrial:
    """Set a trial up, which its first step starts."""
    base, dataset, evaluator = shared(data)
    trial = object.__new__(LocalTrial)
    common = TrialContext(
        search="s",
        base=base,
        dataset=dataset,
        metrics=[FRECHET],
        resources=WorkerResources(1.0, 0.0, 1, None),
        **{"space": Space.from_yaml(SPACE), "folder": RunStorage(str(folder), "trials"), **context},
    )
    trial.setup(point(0, values), context=common, rows=dataset.read("train"), evaluator=evaluator)
    return trial


def point(number: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"point": {"number": number, "values": values}}


def trainers_equal(ours: Trainer, theirs: Trainer) -> bool:
    """Whether both have the same weights, to the bit."""
    one, other = (
        (trainer.gan.generator.state_dict(), trainer.gan.discriminator.state_dict())
        for trainer in (ours, theirs)
    )
    return states_equal(one, other)


VALUES = {"optimizer.lr_g": 0.004, "generator.depth": 2}

Whole = tuple[LocalTrial, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: str) -> Whole:
    """A trial that ran to its end, and its results."""
    trial = start(tmp_path_factory.mktemp("whole"), digits, VALUES)
    return trial, [trial.step() for _ in range(EPOCHS)]


def assert_ends_like(trial: LocalTrial, whole: Whole, epochs: int = 0) -> None:
    """Train a trial, of which so many epochs are done, to the results and weights of the whole."""
    results = [trial.step() for _ in range(EPOCHS - epochs)]
    assert [(r["epoch"], r["frechet"]) for r in results] == [
        (r["epoch"], r["frechet"]) for r in whole[1][epochs:]
    ]
    assert results[-1]["done"]
    assert trainers_equal(trial.trainer, whole[0].trainer)


def test_it_trains_and_evaluates_as_a_run_with_those_values(whole: Whole) -> None:
    trial, results = whole
    assert repr(trial) == "search s: trial 0000 and later ones"  # as the dashboard shows it
    assert [r["epoch"] for r in results] == [1, 2, 3]
    assert [r["status"] for r in results] == ["running", "running", "finished"]
    assert [r["done"] for r in results] == [False, False, True]
    config = trial.run_config
    assert (config.optimizer.lr_g, config.generator.depth) == (0.004, 2)
    device, dtype = resolve_device(config.device, config.precision)  # bfloat16 on some processors
    loader = InMemoryLoader.read(Partition(trial.context.dataset, config), device)
    trainer = Trainer(config, loader, device, dtype)
    for _ in range(EPOCHS):
        trainer.train_epoch()
    assert trainers_equal(trainer, trial.trainer)

    metrics = trial.evaluator.evaluate(cl_ray.load(trial.folder.uri)).metrics()
    assert results[-1]["frechet"] == pytest.approx(metrics["frechet"], rel=1e-4)
    assert results[-1]["metrics"]["linear_probe"] == pytest.approx(metrics["linear_probe"])

    # Asked once more, it repeats its last result and trains nothing.
    steps = trial.trainer.gan.steps
    assert trial.step() == results[-1]
    assert trial.trainer.gan.steps == steps


def test_the_process_is_reused_by_other_trials(
    whole: Whole, digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = start(tmp_path, digits, {"generator.depth": 1})
    trial.step()
    evaluator = trial.evaluator
    first, build = weakref.ref(trial.trainer.gan), LocalTrial._build_trainer

    def build_alone(self: LocalTrial) -> Trainer:
        assert first() is None  # its memory is free
        return build(self)

    monkeypatch.setattr(LocalTrial, "_build_trainer", build_alone)
    assert trial.reset_config(point(1, VALUES))
    assert_ends_like(trial, whole)
    assert trial.evaluator is evaluator
    assert sorted(p.name for p in (tmp_path / "trials").iterdir()) == ["0000", "0001"]


@pytest.mark.parametrize(("last", "steps"), [("_save", 16), ("_evaluate", 20)])
def test_another_process_resumes_and_repeats_nothing(
    whole: Whole, digits: str, tmp_path: Path, last: str, steps: int
) -> None:
    """Killed in mid-epoch, or before the epoch's evaluation."""
    values = {**VALUES, "log_every": 4, "checkpoint.every": 8, "optimizer.ema_decay": 0.998}
    first = start(tmp_path, digits, values)
    first.step()
    method = getattr(first, last)

    def kill(*arguments: Any) -> None:
        method(*arguments)
        raise KeyboardInterrupt

    setattr(first, last, kill)
    with pytest.raises(KeyboardInterrupt):
        first.step()
    resumed = start(tmp_path, digits, values)
    assert resumed.trainer.gan.steps == steps
    assert_ends_like(resumed, whole, epochs=1)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_one_process_at_a_time_writes_to_its_folder(
    whole: Whole, digits: str, tmp_path: Path
) -> None:
    """Ray Tune gives a trial to a process that is free, and to a new one if the old is lost."""
    first = start(tmp_path, digits, VALUES)
    first.step()
    before = contents(tmp_path)
    created = set_up(tmp_path, digits, VALUES)  # for the trial, which `first` was given meanwhile
    created.cleanup()
    assert contents(tmp_path) == before
    second = start(tmp_path, digits, VALUES)
    with pytest.raises(LeaseLostError, match="trials/0000 was taken over by process "):
        first.step()
    first.cleanup()
    assert_ends_like(second, whole, epochs=1)
    assert [line["epoch"] for line in second.lines()] == [1, 2, 3]


def test_a_damaged_checkpoint_is_put_aside(whole: Whole, digits: str, tmp_path: Path) -> None:
    first = start(tmp_path, digits, VALUES)
    for _ in range(2):
        first.step()
    newest = Path(first.checkpoints.folder) / "step-00000020"
    (newest / "state.pt").write_bytes(b"rot")
    resumed = start(tmp_path, digits, VALUES)
    assert resumed.trainer.gan.steps == 10
    result = resumed.step()
    (note,) = result["notes"]
    assert note.endswith(
        " The checkpoint is put aside as damaged-step-00000020, and the run goes on from "
        "step-00000010."
    )
    assert [result["epoch"], result["frechet"]] == [2, whole[1][1]["frechet"]]
    assert resumed.notes == []
    assert_ends_like(resumed, whole, epochs=2)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
@pytest.mark.parametrize("moment", ["as it starts", "as it trains"])
def test_a_full_disk_is_reported_and_with_room_it_goes_on(
    whole: Whole, digits: str, tmp_path: Path, moment: str
) -> None:
    first = start(tmp_path, digits, VALUES)
    first.step()
    with file_size_limit(500 if moment == "as it starts" else 20_000):
        if moment == "as it starts":
            first.reset_config(point(0, VALUES))
        result = first.step()
    assert result["storage_fault"].startswith(f"{tmp_path}/trials/0000")
    assert "cannot be written (File too large): " in result["storage_fault"]
    assert {"number", "epoch", "frechet"} < result.keys()  # which Ray Tune needs
    assert first.folder.read(ERROR_FILE) is None
    resumed = start(tmp_path, digits, VALUES)
    assert resumed.trainer.gan.steps == 10
    assert_ends_like(resumed, whole, epochs=1)


def test_a_machine_that_does_not_see_the_search_ends_it(digits: str, tmp_path: Path) -> None:
    """An autoscaler may add it after the search has begun; that is no failure of the trial."""
    search = RunStorage(str(tmp_path), "s").take_lease()
    trial = set_up(tmp_path, digits, VALUES, folder=search.subfolder("trials"))
    search.delete(LEASE_FILE)
    fault = trial.step()["storage_fault"]
    assert fault.startswith(f"{tmp_path}/s is not there on {socket.gethostname()}: it was deleted")
    assert not (tmp_path / "s" / "trials").exists()


RECORDS = ["_hparams_/experiment", "_hparams_/session_start_info"]


def test_hparams_compares_all_that_is_searched(digits: str, tmp_path: Path) -> None:
    """Also what a trial does not search; once, also if it is killed and resumed at any moment."""
    searched = """
    optimizer.lr_g: {kind: log, low: 1.0e-9, high: 0.01}
    losses.objective: {kind: choice, values: [non-saturating, wasserstein]}
    losses.gradient_penalty: {kind: log, low: 1, high: 9, when: {losses.objective: wasserstein}}
    """
    space = Space.from_yaml(searched)
    values: dict[str, Any] = {"optimizer.lr_g": 2.5e-9, "losses.objective": "non-saturating"}
    start(tmp_path, digits, values, space=space)  # killed before its first checkpoint
    first = start(tmp_path, digits, values, space=space)
    first.step()
    first.cleanup()
    trial = start(tmp_path, digits, values, space=space)  # resumed
    metrics = trial.step()["metrics"]
    other = {
        "optimizer.lr_g": 0.001, "losses.objective": "wasserstein", "losses.gradient_penalty": 3.0
    }  # fmt: skip
    trial.reset_config(point(1, other))
    trial.ensure_started()
    trial.cleanup()

    for number in range(2):
        tags = record_tags(tmp_path / "trials" / f"{number:04d}")
        assert tags[:2] == RECORDS
        assert not set(tags[2:]) & set(RECORDS)
    types, tags, rows = hparams_tab(tmp_path / "trials")
    assert types == {
        "optimizer.lr_g": NUMBER, "losses.objective": TEXT, "losses.gradient_penalty": NUMBER
    }  # fmt: skip
    assert tags[0] == "evaluation/frechet"
    assert set(rows) == {"s/0000", "s/0001"}
    assert rows["s/0001"] == other
    row = rows["s/0000"]
    assert {**values, "losses.gradient_penalty": 10.0}.items() <= row.items()
    assert row["evaluation/frechet"] == pytest.approx(metrics["frechet"])
    assert row["evaluation/knn_1"] == pytest.approx(metrics["knn_1"])


def test_a_metric_that_is_nan_or_inf_ends_it_with_the_worst_score(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = start(tmp_path, digits, VALUES)
    first = trial.step()
    monkeypatch.setattr(trial, "_evaluate", lambda model: {"frechet": -math.inf, "knn_1": 0.9})
    result = trial.step()
    assert (result["status"], result["done"], result["frechet"]) == ("collapsed", True, 1e6)
    assert result["reason"] == "frechet is -inf after epoch 2."
    assert result["history"] == {1: first["frechet"]}
    # Another process finds it in the log.
    assert start(tmp_path, digits, VALUES).trainer.epochs == 2


def test_a_metric_that_was_not_measured_ends_it_with_the_worst_score(
    digits: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trial = start(tmp_path, digits, VALUES)
    monkeypatch.setattr(trial, "_evaluate", lambda model: {"knn_1": 0.9})
    result = trial.step()
    assert (result["status"], result["done"], result["frechet"]) == ("collapsed", True, 1e6)
    assert result["reason"] == "frechet could not be measured after epoch 1."


def test_a_nan_or_inf_loss_ends_it_with_the_worst_score(digits: str, tmp_path: Path) -> None:
    trial = start(tmp_path, digits, {"losses.adversarial": 1e39})
    result = trial.step()
    assert result["done"]
    assert (result["status"], result["frechet"]) == ("diverged", 1e6)
    assert "at step 1" in result["reason"]


def test_a_collapsed_generator_ends_it_once_it_has_trained(
    whole: Whole, digits: str, tmp_path: Path
) -> None:
    assert whole[0].trainer.gan.steps < 100  # earlier, samples may be alike
    trial = start(tmp_path, digits, {"batch_size": 2})
    with torch.no_grad():
        trial.trainer.gan.ema_generator.decode = (  # type: ignore[method-assign]
            lambda z, *_, **__: torch.zeros(len(z), 1, 28, 28)
        )
    result = trial.step()
    assert trial.trainer.gan.steps > 100
    assert result["done"]
    assert (result["status"], result["frechet"]) == ("collapsed", 1e6)
    assert "the same image of all noise after epoch 1" in result["reason"]


def test_an_error_is_written_to_the_folder(digits: str, tmp_path: Path) -> None:
    trial = start(tmp_path, digits, {"pairs.quantile": 0.999999})
    with pytest.raises(UserError, match="no negative as far as"):
        trial.step()
    assert "no negative as far as" in (trial.folder.read(ERROR_FILE) or b"").decode()


@pytest.fixture
def better(digits: str, tmp_path: Path) -> LocalTrial:
    """A trial of a population, whose weights after an epoch others load from the folder."""
    trial = start(tmp_path / "better", digits, VALUES, exploits=True)
    trial.step()
    trial.save_checkpoint(str(tmp_path))
    return trial


def test_a_diverged_trial_of_a_population_continues_with_another_s_weights(
    better: LocalTrial, digits: str, tmp_path: Path
) -> None:
    worse = start(tmp_path / "worse", digits, {"losses.adversarial": 1e39}, exploits=True)
    worse.epoch_seconds = 0.0
    results = [worse.step(), worse.step()]
    assert [r["status"] for r in results] == ["diverged", "diverged"]
    assert [r["epoch"] for r in results] == [1, 2]
    assert not any(r["done"] for r in results)
    assert worse.reset_config(point(0, {**VALUES, "optimizer.lr_d": 0.004}))
    worse.load_checkpoint(str(tmp_path))
    assert trainers_equal(worse.trainer, better.trainer)
    assert worse.trainer.gan.g_optimizer.state_dict()["adam"]["state"][0]["step"] == 10
    result = worse.step()
    assert (result["epoch"], result["status"]) == (2, "running")
    assert worse.trainer.gan.d_optimizer.configured_lr == 0.004
    better.step()
    assert not trainers_equal(worse.trainer, better.trainer)  # the rates differ
    newest = CheckpointStore(*worse.folder.open()).newest()  # what it resumes from after a kill
    assert newest is not None
    assert newest.step == 20


def test_the_copied_weights_may_be_of_another_architecture(
    better: LocalTrial, digits: str, tmp_path: Path
) -> None:
    own = {"optimizer.lr_g": 0.001, "generator.depth": 3}
    worse = start(tmp_path / "worse", digits, own, exploits=True)
    worse.step()  # its own checkpoint is of three layers
    copied = {**VALUES, "optimizer.lr_g": 0.002}
    assert worse.reset_config(point(0, copied))
    worse.load_checkpoint(str(tmp_path))
    assert trainers_equal(worse.trainer, better.trainer)
    assert worse.step()["values"] == copied
    # Killed before the study knows of it, the weights decide the architecture.
    resumed = start(tmp_path / "worse", digits, own, exploits=True)
    assert trainers_equal(resumed.trainer, worse.trainer)
    assert resumed.values == {**own, "generator.depth": VALUES["generator.depth"]}
    assert resumed.run_config.generator.depth == VALUES["generator.depth"]
