"""Importances of searched fields, and that nothing is claimed of too few trials."""

import random
from dataclasses import replace

import optuna
import pytest
from helpers.small_search import FRECHET

from cl_ray.config import preset
from cl_ray.tuning.importance import (
    MIN_COMPARABLE,
    comparable_trials,
    importance_summary,
    parameter_importances,
)
from cl_ray.tuning.space import Space
from cl_ray.tuning.study import TrialResult

SPACE = Space.from_yaml(
    "optimizer.lr_g: {kind: log, low: 0.0001, high: 0.01}\n"
    "optimizer.lr_d: {kind: log, low: 0.0001, high: 0.01}"
)


def trials(count: int, later: int = 1) -> list[TrialResult]:
    """Finished trials whose metric depends on G's learning rate; every `later`th has 2 epochs."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    results = []
    for number in range(count):
        values = SPACE.suggest(study.ask(), preset("quick"))
        cost = abs(values["optimizer.lr_g"] - 0.001) * 1000
        history = {1: 10 * cost, **({} if number % later else {2: cost})}
        metrics = {"frechet": cost}
        results.append(TrialResult(number, "finished", values, metrics, 2, history=history))
    return results


def test_importances_are_of_trials_of_the_same_length() -> None:
    results = trials(40)
    results += [TrialResult(40 + n, "finished", {}, history={1: 1.0}) for n in range(5)]
    comparable, epoch = comparable_trials(results)
    assert (comparable, epoch) == (results[:40], 2)
    importances = parameter_importances(comparable, epoch, FRECHET, SPACE)
    assert list(importances) == ["optimizer.lr_g"]  # the other one explains what chance would
    assert importances["optimizer.lr_g"] > 0.8
    sentence = importance_summary(comparable, epoch, FRECHET, importances)
    assert sentence.startswith("Of 40 trials after 2 epochs, frechet depends most on lr_g (")
    assert "In the best quarter, D's learning rate is" in sentence


def test_an_earlier_epoch_of_ten_trials_comes_before_a_later_one_of_fewer() -> None:
    results = trials(12, later=2)
    assert comparable_trials(results) == (results, 1)
    few = trials(7, later=2)
    assert comparable_trials(few) == (few[::2], 2)
    assert comparable_trials(few[:1]) == (few[:1], 1)
    assert comparable_trials([]) == ([], 0)


@pytest.mark.parametrize("count", [0, 1, MIN_COMPARABLE - 1])
def test_nothing_is_claimed_of_fewer_than_ten_trials(count: int) -> None:
    comparable, epoch = comparable_trials(trials(count))
    assert parameter_importances(comparable, epoch, FRECHET, SPACE) == {}
    for given in ({}, {"optimizer.lr_g": 0.9}):
        sentence = importance_summary(comparable, epoch, FRECHET, given)
        assert "too few to estimate importances" in sentence
        assert "%" not in sentence
        assert "quarter" not in sentence
    if count == 1:
        assert sentence.startswith("1 trial after 1 epoch is too few")


def test_nothing_is_claimed_of_equal_trials() -> None:
    same = [
        TrialResult(n, "finished", {}, {"frechet": 1.0}, 1, history={1: 1.0}) for n in range(12)
    ]
    assert parameter_importances(same, 1, FRECHET, SPACE) == {}
    sentence = importance_summary(same, 1, FRECHET, {})
    assert (
        sentence == "Of 12 trials after 1 epoch, no field explains more of frechet than chance "
        "would."
    )


def test_nothing_is_claimed_of_a_metric_that_no_field_decides() -> None:
    noise = random.Random(0)
    found = [replace(r, history={2: noise.gauss(50, 10)}) for r in trials(12)]
    assert parameter_importances(found, 2, FRECHET, SPACE) == {}
