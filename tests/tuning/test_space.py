"""What is searched, and what is refused before anything starts."""

import random

import optuna
import pytest

from cl_ray.config import Config, leaves, preset
from cl_ray.errors import UserError
from cl_ray.tuning.importance import what_mattered
from cl_ray.tuning.space import DEFAULT, Space, configured
from cl_ray.tuning.study import SearchMetric, TrialResult

BASE = preset("quick")


def draw(space: Space, count: int, base: Config = BASE) -> list[dict[str, object]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [space.suggest(study.ask(), base) for _ in range(count)]


def test_every_draw_of_the_default_space_is_a_config_with_g_no_deeper_than_d() -> None:
    space = Space.from_yaml(DEFAULT)
    space.check(BASE)
    drawn = draw(space, 200)
    for values in drawn:
        assert set(values) == set(space.parameters)
        assert all(space.parameters[field].holds(value) for field, value in values.items())
        config = configured(BASE, values)
        assert config.generator.depth <= config.discriminator.depth
        assert config.optimizer.lr_g == values["optimizer.lr_g"]
    assert {(v["generator.depth"], v["discriminator.depth"]) for v in drawn} >= {(2, 2), (4, 5)}


def test_the_default_space_holds_what_the_presets_are() -> None:
    space = Space.from_yaml(DEFAULT)
    points = space.known(BASE)
    own = dict(leaves(BASE.model_dump()))
    assert points[0] == {field: own[field] for field in space.parameters}
    assert len(points) > 1
    for point in points:
        configured(BASE, point)


def test_known_points_outside_the_space_are_left_to_chance() -> None:
    space = Space.from_yaml("optimizer.lr_g: {kind: log, low: 0.1, high: 0.5}")
    assert space.known(BASE) == []


def test_numbers_that_yaml_takes_for_strings_are_numbers() -> None:
    space = Space.from_yaml(
        """
        optimizer.lr_g: {kind: choice, values: [1e-3, 3e-3]}
        optimizer.lr_d: {kind: choice, values: [2e-3, 4e-4]}
        losses.pair: {kind: log, low: 1e-2, high: 1e-1, when: {optimizer.lr_g: [1e-3]}}
        losses.objective: {kind: choice, values: [non-saturating, hinge]}
        """
    )
    space.check(BASE)
    assert [point["optimizer.lr_g"] for point in space.known(BASE)] == [3e-3, 1e-3]
    for values in draw(space, 20):
        assert values["optimizer.lr_g"] in (1e-3, 3e-3)
        assert values["optimizer.lr_d"] in (2e-3, 4e-4)
        assert ("losses.pair" in values) == (values["optimizer.lr_g"] == 1e-3)
        assert values["losses.objective"] in ("non-saturating", "hinge")
    rows = [
        TrialResult(number, "finished", values, history={1: float(number)})
        for number, values in enumerate(draw(space, 12))
    ]
    told = what_mattered(rows, 1, SearchMetric("frechet", larger=False), {"optimizer.lr_g": 1.0})
    assert "The best quarter trains D at" in told


def test_what_others_depend_on_is_drawn_first_and_conditions_hold() -> None:
    space = Space.from_yaml(
        """
        losses.pair: {kind: float, low: 0.5, high: 0.6, when: {losses.objective: pair-critic}}
        generator.depth: {kind: int, low: 1, high: 9, step: 2, at_most: discriminator.depth}
        losses.objective: {kind: choice, values: [non-saturating, pair-critic]}
        """
    )
    space.check(BASE)
    drawn = draw(space, 60)
    assert {v["losses.objective"] for v in drawn} == {"non-saturating", "pair-critic"}
    for values in drawn:
        assert ("losses.pair" in values) == (values["losses.objective"] == "pair-critic")
    # D's depth is not searched: the config's own, 3, bounds G's.
    assert {v["generator.depth"] for v in drawn} == {1, 3}
    assert configured(BASE, drawn[0]).losses.pair in (BASE.losses.pair, drawn[0].get("losses.pair"))


OBJECTIVES = """
losses.gradient_penalty: {kind: log, low: 1, high: 30, when: {losses.objective: wasserstein}}
losses.r1: {kind: log, low: 0.1, high: 10, when: {losses.objective: [non-saturating, hinge]}}
losses.objective: {kind: choice, values: [non-saturating, hinge, wasserstein, pair-critic]}
"""


def test_an_objective_is_searched_with_the_penalty_that_it_needs() -> None:
    space = Space.from_yaml(OBJECTIVES)
    assert Space.from_yaml(space.to_yaml()) == space
    space.check(BASE)
    drawn = draw(space, 60)
    penalties = {
        "wasserstein": {"losses.gradient_penalty"},
        "non-saturating": {"losses.r1"},
        "hinge": {"losses.r1"},
        "pair-critic": set(),
    }
    assert {v["losses.objective"] for v in drawn} == set(penalties)
    for values in drawn:
        objective = values["losses.objective"]
        assert values.keys() - {"losses.objective"} == penalties[objective]
        losses = configured(BASE, values).losses
        assert (losses.gradient_penalty > 0) == (objective == "wasserstein")
    assert space.known(BASE) == [{"losses.objective": "non-saturating"}]


def test_a_penalty_may_be_searched_for_every_objective() -> None:
    space = Space.from_yaml(
        "losses.objective: {kind: choice, values: [non-saturating, wasserstein]}\n"
        "losses.gradient_penalty: {kind: log, low: 1, high: 30}\n"
    )
    space.check(BASE)
    assert all(configured(BASE, values).losses.gradient_penalty >= 1 for values in draw(space, 9))


def test_a_space_reads_back_from_its_own_yaml() -> None:
    space = Space.from_yaml(DEFAULT)
    assert Space.from_yaml(space.to_yaml()) == space


def test_numbers_move_within_their_range_and_the_architecture_stays() -> None:
    space = Space.from_yaml(DEFAULT)
    (values,) = draw(space, 1)
    moved = space.perturbed(values, random.Random(0))
    for field in ("optimizer.lr_g", "optimizer.lr_d", "losses.contrastive"):
        low, high = space.parameters[field].ends()
        ratio = moved[field] / values[field]  # type: ignore[operator]
        assert (
            ratio == pytest.approx(0.8)
            or ratio == pytest.approx(1.25)
            or moved[field] in (low, high)
        )
    for field in ("generator.depth", "discriminator.width", "batch_size", "optimizer.d_steps"):
        assert moved[field] == values[field]


RATE, DEPTH = "optimizer.lr_g", "generator.depth"
CIRCLE = """
losses.pair: {kind: float, low: 0, high: 1, at_most: losses.contrastive}
losses.contrastive: {kind: float, low: 1, high: 2, at_most: losses.pair}
"""


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("[1]", "must be a mapping"),
        ("{}", "must be a mapping of one or more"),
        ("a: {kind: [", "is not YAML"),
        (f"{RATE}: {{kind: log, low: 0.1, high: 0.1}}", "from low 0.1 to high 0.1 is empty"),
        (f"{RATE}: {{kind: log, low: 0, high: 0.1}}", "must be more than 0 for log"),
        (f"{RATE}: {{kind: log, low: 0.1}}", "log takes low and high"),
        (f"{RATE}: {{kind: log, low: 0.1, high: 3}}", "lr_g 3.0 is refused"),
        ("batch_size: {kind: choice, values: []}", "at least one"),
        ("batch_size: {kind: choice, values: [32, 32]}", "names one of them twice"),
        (f"{DEPTH}: {{kind: int, low: 1.5, high: 3}}", "whole numbers"),
        (f"{DEPTH}: {{kind: int, low: 1, high: 3, most: 2}}", "'most' is not known; a range has"),
        (f"{DEPTH}: {{kind: odd, low: 1, high: 3}}", "kind 'odd' is refused"),
        (f"{DEPTH}: {{kind: int, low: 2, high: 13}}", "generator.depth 13 is refused"),
        ("optimizer.lrg: {kind: log, low: 0.1, high: 0.2}", "the nearest is 'optimizer.lr_g'"),
        ("epochs: {kind: int, low: 1, high: 3}", "epochs is not to be searched: --epochs"),
        ("evaluation.samples: {kind: int, low: 10, high: 30}", "measured otherwise"),
        (
            "losses.pair: {kind: float, low: 0, high: 1, when: {losses.kind: a}}",
            "depends on 'losses.kind', which is no field",
        ),
        (
            f"{DEPTH}: {{kind: int, low: 4, high: 5, at_most: discriminator.depth}}",
            "the range is empty where discriminator.depth is 3",
        ),
        (
            "losses.objective: {kind: choice, values: [non-saturating, wasserstein]}",
            "objective 'wasserstein' has no bound of its own: set losses.gradient_penalty",
        ),
        (
            OBJECTIVES.replace("when: {losses.objective: wasserstein}", "when: {batch_size: 7}"),
            "losses.gradient_penalty: batch_size is never 7, as its `when` asks",
        ),
        (
            OBJECTIVES.replace("hinge]}}", "hinged]}}"),
            "losses.r1: losses.objective is never 'hinged', as its `when` asks",
        ),
        (CIRCLE, "depend on each other in a circle"),
    ],
)
def test_a_wrong_space_is_refused_by_name(text: str, complaint: str) -> None:
    with pytest.raises(UserError) as caught:
        Space.from_yaml(text).check(BASE)
    assert complaint in str(caught.value)
