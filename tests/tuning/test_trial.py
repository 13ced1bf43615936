"""One trial, in this process: the class that Ray Tune calls, on real digits."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers.small_search import SMALL

import cl_ray
from cl_ray.checkpoint import CheckpointStore
from cl_ray.config import build, merge, preset
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluator
from cl_ray.storage import RunStorage
from cl_ray.trainer import Trainer
from cl_ray.training.resources import WorkerResources
from cl_ray.tuning.local_trial import LocalTrial
from cl_ray.tuning.study import SearchMetric
from cl_ray.tuning.trial import ERROR, TrialContext

EPOCHS = 3


def begin(folder: Path, data: str, values: dict[str, Any], **job: Any) -> LocalTrial:
    """A trial as Ray Tune sets it up, with no Ray around it."""
    dataset = Dataset.open(data)
    fields = {**yaml.safe_load(SMALL), "epochs": EPOCHS, "checkpoint": {"keep": 1}}
    base = build(merge(preset("quick").model_dump(), fields))
    trial = object.__new__(LocalTrial)
    common = TrialContext(
        search="s",
        folder=RunStorage(str(folder), "trials"),
        base=base,
        dataset=dataset,
        metrics=[SearchMetric("frechet", larger=False)],
        plan=WorkerResources(1.0, 0.0, 1, None),
        **job,
    )
    evaluator = Evaluator(dataset, base.evaluation, base.seed)
    trial.setup(point(0, values), job=common, rows=dataset.read("train"), evaluator=evaluator)
    return trial


def point(number: int, values: dict[str, Any]) -> dict[str, Any]:
    return {"point": {"number": number, "values": values}}


def weights(run: Trainer) -> list[torch.Tensor]:
    return [w.detach().clone() for w in (*run.gan.g_params, *run.gan.d_params)]


def alike(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


VALUES = {"optimizer.lr_g": 0.004, "generator.depth": 2}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, digits: str) -> tuple[LocalTrial, list[Any]]:
    """A trial that ran to its end, and what it said."""
    trial = begin(tmp_path_factory.mktemp("whole"), digits, VALUES)
    return trial, [trial.step() for _ in range(EPOCHS)]


def test_it_trains_what_a_run_of_those_values_trains(
    whole: tuple[LocalTrial, list[Any]],
) -> None:
    trial, results = whole
    assert [r["epoch"] for r in results] == [1, 2, 3]
    assert [r["status"] for r in results] == ["running", "running", "finished"]
    assert [r["done"] for r in results] == [False, False, True]
    config = trial.run.config
    assert config.optimizer.lr_g == 0.004
    assert config.generator.depth == 2
    device, dtype = resolve_device(config)  # bfloat16 on some processors
    run = Trainer(
        config, InMemoryLoader.read(Partition(trial.job.dataset, config), device), device, dtype
    )
    for _ in range(EPOCHS):
        run.train_epoch()
    assert alike(weights(run), weights(trial.run))


def test_its_figures_are_the_evaluation_s(whole: tuple[LocalTrial, list[Any]]) -> None:
    trial, results = whole
    loaded = cl_ray.load(trial.folder.uri)
    metrics = trial.evaluator.evaluate(loaded).metrics()
    assert results[-1]["frechet"] == pytest.approx(metrics["frechet"], rel=1e-4)
    assert results[-1]["metrics"]["linear_probe"] == pytest.approx(metrics["linear_probe"])


def test_the_process_is_kept_for_other_trials(
    whole: tuple[LocalTrial, list[Any]], digits: str, tmp_path: Path
) -> None:
    trial = begin(tmp_path, digits, {"generator.depth": 1})
    trial.step()
    evaluator = trial.evaluator
    assert trial.reset_config(point(1, VALUES))
    results = [trial.step() for _ in range(EPOCHS)]
    assert trial.evaluator is evaluator
    for ours, theirs in zip(results, whole[1], strict=True):
        assert ours["frechet"] == theirs["frechet"]
    assert alike(weights(trial.run), weights(whole[0].run))
    assert sorted(p.name for p in (tmp_path / "trials").iterdir()) == ["0000", "0001"]


@pytest.mark.parametrize("stop", ["between epochs", "before it was measured", "in mid-epoch"])
def test_another_process_goes_on_and_repeats_nothing(
    whole: tuple[LocalTrial, list[Any]], digits: str, tmp_path: Path, stop: str
) -> None:
    values = {**VALUES, "log_every": 4, "optimizer.average": 0.998}
    first = begin(tmp_path, digits, values)
    first.step()
    if stop != "between epochs":
        cut_short(first, stop)
    again = begin(tmp_path, digits, values)
    took = again.run.gan.steps
    assert took == {"between epochs": 10, "before it was measured": 20, "in mid-epoch": 16}[stop]
    results = []
    while not results or not results[-1]["done"]:
        results.append(again.step())
    assert [r["epoch"] for r in results] == [2, 3]
    assert [r["frechet"] for r in results] == [r["frechet"] for r in whole[1][1:]]
    assert alike(weights(again.run), weights(whole[0].run))


def cut_short(trial: LocalTrial, stop: str) -> None:
    """End a trial in its second epoch, as a kill would."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    if stop == "in mid-epoch":
        every = {"checkpoint": trial.run.config.checkpoint.model_copy(update={"every": 8})}
        trial.run.config = trial.run.config.model_copy(update=every)
        save = trial._save
        trial._save = lambda: (save(), killed())  # type: ignore[method-assign]
    else:
        trial._evaluate = killed  # type: ignore[method-assign, assignment]
    with pytest.raises(KeyboardInterrupt):
        trial.step()


def test_one_that_was_over_says_so_again(whole: tuple[LocalTrial, list[Any]]) -> None:
    trial, results = whole
    steps = trial.run.gan.steps
    again = trial.step()
    assert again == results[-1]
    assert trial.run.gan.steps == steps


def test_a_loss_that_is_no_number_ends_it_with_the_worst_score(digits: str, tmp_path: Path) -> None:
    trial = begin(tmp_path, digits, {"losses.adversarial": 1e39})
    result = trial.step()
    assert result["done"]
    assert result["status"] == "diverged"
    assert result["frechet"] == 1e6
    assert "became" in result["reason"]
    assert "at step 1" in result["reason"]


def test_one_picture_of_all_noise_ends_it(digits: str, tmp_path: Path) -> None:
    trial = begin(tmp_path, digits, {"batch_size": 2})
    with torch.no_grad():
        trial.run.gan.ema_generator.decode = lambda z, *_, **__: torch.zeros(len(z), 1, 28, 28)  # type: ignore[method-assign]
    result = trial.step()
    assert trial.run.gan.steps > 100
    assert result["status"] == "collapsed"
    assert "one picture of all noise after epoch 1" in result["reason"]
    assert result["frechet"] == 1e6
    assert result["done"]


def test_an_early_picture_may_still_be_one(whole: tuple[LocalTrial, list[Any]]) -> None:
    assert whole[0].run.gan.steps < 100


def test_an_error_is_left_in_the_folder(digits: str, tmp_path: Path) -> None:
    trial = begin(tmp_path, digits, {"pairs.quantile": 0.999999})
    with pytest.raises(UserError, match="no negative as far as"):
        trial.step()
    assert "no negative as far as" in (trial.folder.read(ERROR) or b"").decode()


def test_a_population_s_trial_takes_over_another_s_networks(
    whole: tuple[LocalTrial, list[Any]], digits: str, tmp_path: Path
) -> None:
    """The one that diverged goes on where the better one stands, with its own rates."""
    better = begin(tmp_path / "better", digits, VALUES, replaced=True)
    better.step()
    state = tmp_path / "state"
    state.mkdir()
    better.save_checkpoint(str(state))

    worse = begin(tmp_path / "worse", digits, {"losses.adversarial": 1e39}, replaced=True)
    worse.pace = 0.0
    results = [worse.step(), worse.step()]
    assert [r["status"] for r in results] == ["diverged", "diverged"]
    assert [r["epoch"] for r in results] == [1, 2]
    assert not any(r["done"] for r in results)
    assert worse.reset_config(point(0, {**VALUES, "optimizer.lr_d": 0.005}))
    worse.load_checkpoint(str(state))
    assert alike(weights(worse.run), weights(better.run))
    assert worse.run.gan.g_optimizer.state_dict()["state"][0]["step"] == 10
    result = worse.step()
    assert result["epoch"] == 2
    assert result["status"] == "running"
    assert worse.run.gan.d_optimizer.param_groups[0]["lr"] == 0.005
    better.step()
    assert not alike(weights(worse.run), weights(better.run))  # the rates differ
    # What it took over is what it goes on from after a kill.
    newest = CheckpointStore(*worse.folder.open()).newest()
    assert newest is not None
    assert newest.step == 20


def test_what_is_taken_over_may_be_of_another_architecture(digits: str, tmp_path: Path) -> None:
    better = begin(tmp_path / "better", digits, VALUES, replaced=True)
    better.step()
    state = tmp_path / "state"
    state.mkdir()
    better.save_checkpoint(str(state))

    own = {"optimizer.lr_g": 0.001, "generator.depth": 3}
    worse = begin(tmp_path / "worse", digits, own, replaced=True)
    worse.step()  # its own checkpoint is of three layers
    taken = {**VALUES, "optimizer.lr_g": 0.002}
    assert worse.reset_config(point(0, taken))
    worse.load_checkpoint(str(state))
    assert alike(weights(worse.run), weights(better.run))
    assert worse.step()["values"] == taken
    # Killed before the study heard of it: the weights say what it is.
    again = begin(tmp_path / "worse", digits, own, replaced=True)
    assert alike(weights(again.run), weights(worse.run))
    assert again.values == {**own, "generator.depth": VALUES["generator.depth"]}
    assert again.run.config.generator.depth == VALUES["generator.depth"]
