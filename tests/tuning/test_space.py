"""Search spaces: the shipped files, drawing, dependencies, and refusals."""

import random
from pathlib import Path
from typing import Any

import optuna
import pytest

from cl_ray.config import Config, leaves, preset
from cl_ray.errors import UserError
from cl_ray.tuning.space import Space, apply_values

BASE = preset("quick")
BALANCE = Space.load("balance")


def draw(space: Space, count: int, base: Config = BASE) -> list[dict[str, Any]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=1))
    return [space.suggest(study.ask(), base) for _ in range(count)]


@pytest.mark.parametrize("name", ["balance", "rates", "objectives", "template"])
def test_shipped_spaces_are_searchable_and_read_back(name: str) -> None:
    space = Space.load(name)
    space.check(BASE)
    assert Space(parameters=space.parameters).to_dict() == space.to_dict()
    drawn = draw(space, 40)
    for values in drawn:
        assert all(space.parameters[field].contains(value) for field, value in values.items())
        apply_values(BASE, values)
    points = space.initial_points(BASE)
    own = dict(leaves(BASE.model_dump()))
    assert points[0].items() <= own.items()
    for point in points:
        apply_values(BASE, point)


def test_draws_of_the_default_space_have_g_no_deeper_than_d() -> None:
    drawn = draw(BALANCE, 200)
    for values in drawn:
        assert set(values) == set(BALANCE.parameters)
        config = apply_values(BASE, values)
        assert config.generator.depth <= config.discriminator.depth
        assert config.optimizer.lr_g == values["optimizer.lr_g"]
    assert {(v["generator.depth"], v["discriminator.depth"]) for v in drawn} >= {(2, 2), (4, 5)}


def test_initial_points_have_the_preset_first_and_lie_in_the_space() -> None:
    own = dict(leaves(BASE.model_dump()))
    points = BALANCE.initial_points(BASE)
    assert points[0] == {field: own[field] for field in BALANCE.parameters}
    assert len(points) > 1
    outside = Space.from_yaml("optimizer.lr_g: {kind: log, low: 0.1, high: 0.5}")
    assert outside.initial_points(BASE) == []


def test_numbers_that_yaml_reads_as_strings_are_numbers() -> None:
    space = Space.from_yaml(
        """
        optimizer.lr_g: {kind: choice, values: [1e-2, 3e-3]}
        optimizer.lr_d: {kind: choice, values: [5e-3, 3e-3]}
        losses.pair: {kind: log, low: 1e-2, high: 1e-1, when: {optimizer.lr_g: [1e-2]}}
        losses.objective: {kind: choice, values: [non-saturating, hinge]}
        """
    )
    space.check(BASE)
    assert [point["optimizer.lr_g"] for point in space.initial_points(BASE)] == [1e-2, 3e-3]
    for values in draw(space, 20):
        assert values["optimizer.lr_g"] in (1e-2, 3e-3)
        assert values["optimizer.lr_d"] in (5e-3, 3e-3)
        assert ("losses.pair" in values) == (values["optimizer.lr_g"] == 1e-2)
        assert values["losses.objective"] in ("non-saturating", "hinge")


def test_a_field_that_is_not_searched_bounds_another() -> None:
    space = Space.from_yaml(
        "generator.depth: {kind: int, low: 1, high: 9, step: 2, at_most: discriminator.depth}"
    )
    space.check(BASE)
    assert BASE.discriminator.depth == 3
    assert {values["generator.depth"] for values in draw(space, 20)} == {1, 3}


OBJECTIVES = """
losses.gradient_penalty: {kind: log, low: 1, high: 30, when: {losses.objective: wasserstein}}
losses.r1: {kind: log, low: 0.1, high: 10, when: {losses.objective: [non-saturating, hinge]}}
losses.objective: {kind: choice, values: [non-saturating, hinge, wasserstein, pair-critic]}
"""


def test_an_objective_is_searched_with_its_penalty() -> None:
    """Fields are drawn after those that they depend on, wherever they stand."""
    space = Space.from_yaml(OBJECTIVES)
    space.check(BASE)
    penalties = {
        "wasserstein": {"losses.gradient_penalty"},
        "non-saturating": {"losses.r1"},
        "hinge": {"losses.r1"},
        "pair-critic": set(),
    }
    drawn = draw(space, 60)
    assert {v["losses.objective"] for v in drawn} == set(penalties)
    for values in drawn:
        objective = values["losses.objective"]
        assert values.keys() - {"losses.objective"} == penalties[objective]
        losses = apply_values(BASE, values).losses
        assert losses.gradient_penalty == values.get("losses.gradient_penalty", 10.0)
    assert space.initial_points(BASE) == [
        {"losses.objective": "wasserstein", "losses.gradient_penalty": 10.0}
    ]
    always = Space.from_yaml(OBJECTIVES.replace(", when: {losses.objective: wasserstein}", ""))
    always.check(BASE)
    assert all("losses.gradient_penalty" in values for values in draw(always, 9))


def test_hparams_have_every_field_in_one_type() -> None:
    space = Space.from_yaml(
        """
        optimizer.lr_g: {kind: log, low: 1e-5, high: 1e-2}
        generator.depth: {kind: int, low: 1, high: 3}
        batch_size: {kind: choice, values: [32, 64]}
        discriminator.spectral_norm: {kind: choice, values: [true, false]}
        losses.objective: {kind: choice, values: [non-saturating, wasserstein]}
        losses.gradient_penalty: {kind: log, low: 1, high: 9, when: {losses.objective: wasserstein}}
        """
    )
    values = {"optimizer.lr_g": 2e-5, "batch_size": 32, "losses.objective": "non-saturating"}
    assert space.hparams(apply_values(BASE, values)) == {
        **values,
        "generator.depth": BASE.generator.depth,
        "discriminator.spectral_norm": False,
        "losses.gradient_penalty": 10.0,
    }
    warm = Space.from_yaml(
        """
        generator.family: {kind: choice, values: [convolutional, residual]}
        optimizer.lr_warmup_fraction:
          {kind: float, low: 0.01, high: 0.2, when: {generator.family: residual}}
        """
    )
    for family, fraction in (("convolutional", None), ("residual", 0.1)):
        values = {"generator.family": family, "optimizer.lr_warmup_fraction": fraction}
        found = warm.hparams(apply_values(BASE, values))
        assert found["optimizer.lr_warmup_fraction"] == str(fraction)
    mixed = Space.from_yaml("losses.pair: {kind: choice, values: [0.5, none]}")
    assert mixed.hparams(BASE) == {"losses.pair": str(BASE.losses.pair)}


def test_perturbed_numbers_stay_in_range_and_the_architecture_stays() -> None:
    (values,) = draw(BALANCE, 1)
    perturbed = BALANCE.perturb(values, BASE, random.Random(0))
    searched = ("optimizer.lr_g", "optimizer.lr_d", "losses.contrastive")
    for field in (*searched, "generator.latent_noise_std"):
        ratio = perturbed[field] / values[field]
        at_bound = perturbed[field] in BALANCE.parameters[field].bounds()
        assert at_bound or ratio in (pytest.approx(0.8), pytest.approx(1.25))
    for field in ("generator.depth", "discriminator.width", "batch_size", "optimizer.d_steps"):
        assert perturbed[field] == values[field]


def test_a_perturbed_number_is_at_most_what_bounds_it() -> None:
    space = Space.from_yaml(
        """
        optimizer.lr_d: {kind: log, low: 1.0e-5, high: 1.0e-2, at_most: optimizer.lr_g}
        optimizer.lr_g: {kind: log, low: 1.0e-5, high: 1.0e-2}
        """
    )
    values, rng = {"optimizer.lr_d": 1e-3, "optimizer.lr_g": 1e-3}, random.Random(0)
    for _ in range(20):
        values = space.perturb(values, BASE, rng)
        assert values["optimizer.lr_d"] <= values["optimizer.lr_g"]
    alone = {"optimizer.lr_d": BASE.optimizer.lr_g}  # bounded by a field that is not searched
    space = Space.from_yaml(
        "optimizer.lr_d: {kind: log, low: 1e-5, high: 1, at_most: optimizer.lr_g}"
    )
    for _ in range(9):
        assert space.perturb(alone, BASE, rng)["optimizer.lr_d"] <= BASE.optimizer.lr_g


RATE, DEPTH = "optimizer.lr_g", "generator.depth"
CIRCLE = """
losses.pair: {kind: float, low: 0, high: 1, at_most: losses.contrastive}
losses.contrastive: {kind: float, low: 1, high: 2, at_most: losses.pair}
"""


@pytest.mark.parametrize(
    ("text", "message"),
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
        ("epochs: {kind: int, low: 1, high: 3}", "epochs cannot be searched: --epochs"),
        ("evaluation.samples: {kind: int, low: 10, high: 30}", "evaluation.samples cannot be"),
        (
            "losses.pair: {kind: float, low: 0, high: 1, when: {losses.kind: a}}",
            "depends on 'losses.kind', which is no field",
        ),
        (
            f"{DEPTH}: {{kind: int, low: 4, high: 5, at_most: discriminator.depth}}",
            "the range is empty where discriminator.depth is 3",
        ),
        ("losses.gradient_penalty: {kind: choice, values: [0, 10]}", "set losses.gradient_penalty"),
        (
            OBJECTIVES.replace("when: {losses.objective: wasserstein}", "when: {batch_size: 7}"),
            "losses.gradient_penalty: batch_size is never 7, as its `when` requires",
        ),
        (
            OBJECTIVES.replace("hinge]}}", "hinged]}}"),
            "losses.r1: losses.objective is never 'hinged', as its `when` requires",
        ),
        (CIRCLE, "depend on each other in a circle"),
        ("batch_size: {kind: log, low: 32, high: 128}", "with a fractional part"),
        (f"{RATE}: {{kind: log, low: 0.1, high: 0.2, step: 2}}", "step is for int: log has none"),
        (
            f"{DEPTH}: {{kind: int, low: 4, high: 5, at_most: discriminator.depth}}\n"
            "discriminator.depth: {kind: int, low: 4, high: 5, when: {losses.objective: hinge}}\n"
            "losses.objective: {kind: choice, values: [hinge, wasserstein]}",
            "the range is empty where discriminator.depth is 3",
        ),
        (
            "losses.pair: {kind: float, low: 0, high: 1, at_most: device}\n"
            "device: {kind: choice, values: [cpu, auto]}",
            "the range is empty where device is cpu",
        ),
        (f"{RATE}: [0.1, 0.2]", "lr_g: [0.1, 0.2] is no range"),
        (f"{RATE}: {{low: 0.1, high: 0.2}}", "lr_g: it has no kind"),
    ],
)
def test_invalid_spaces_are_refused_by_name(text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        Space.from_yaml(text).check(BASE)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "text",
    ["[1]", "losses.pair: 3", "lr_g: {kind: log, low: 0.1, high: 0.2}", f"{RATE}: {{kind: log}}"],
)
def test_a_refusal_names_the_template(text: str) -> None:
    with pytest.raises(UserError, match=r"explains the format\.$") as caught:
        Space.from_yaml(text).check(BASE)
    template = Path(str(caught.value).split()[-4])
    assert template.name == "template.yaml"
    assert "kind: choice" in template.read_text()
