"""The step: many workers take one's, one takes the plain one, and it goes on exactly."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import five_steps
from helpers.five_steps import (
    CASES,
    CLASSES,
    SHAPE,
    Case,
    D,
    G,
    Outcome,
    global_batch,
    largest_difference,
    small,
    take,
    weights_of,
)
from helpers.plain import Plain
from helpers.ranks import together
from helpers.states import alike, pack, unpack

from cl_ray.errors import UserError
from cl_ray.gan import ContrastiveGAN, LossTerms
from cl_ray.losses.adversarial import OBJECTIVES
from cl_ray.networks.normalize import to_unit
from cl_ray.rng import sample_step_noise

WEIGHTS = ["adversarial", "contrastive", "pair", "approximate_r1"]
WEIGHTS += ["reconstruction", "pair_confusion", "uniformity"]
DIFFERENCES = {"wasserstein", "relativistic"}
"""Objectives that know D's scores by their differences alone."""
OF_SCORES = {"score/real", "score/fake", "g/adversarial"}
PENALTIES = ["r1", "r2", "gradient_penalty"]
NORMED = {"discriminator": {**D, "spectral_norm": True}, "optimizer": {"d_steps": 2}}
STYLED = {"generator": {**G, "family": "style"}, "losses": {"form": "contrad"}}


def made(dtype: torch.dtype = torch.float64, **fields: Any) -> ContrastiveGAN:
    return five_steps.made(small(**fields), dtype)


def step(gan: ContrastiveGAN, *numbers: int) -> list[LossTerms]:
    """Steps on the batches of these numbers, partners apart; returns their terms."""
    labelled = gan.config.condition != "none"
    return [gan.step(global_batch(number, "labels", labelled)) for number in numbers]


def determined(objective: str, *several: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    """The weights that the objective determines.

    Where it knows differences of scores alone, the bias of D's score cancels: its gradient is
    rounding, which Adam scales up to steps of 1e-12.
    """
    free = {"discriminator.score.bias"} if objective in DIFFERENCES else set()
    return [{n: w for n, w in weights.items() if n not in free} for weights in several]


def moved(before: dict[str, torch.Tensor], gan: ContrastiveGAN) -> set[str]:
    """Networks of which a weight changed."""
    after = weights_of(gan)
    return {name.split(".")[0] for name in before if not torch.equal(before[name], after[name])}


@pytest.fixture(scope="module")
def alone() -> list[Outcome]:
    return take(CASES)


@pytest.fixture(scope="module", params=[2, 3, 4])
def many(request: pytest.FixtureRequest) -> list[list[Outcome]]:
    """Of each rank, its outcome of each case."""
    return together(take, request.param, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_many_workers_take_the_step_of_one(
    case: Case, many: list[list[Outcome]], alone: list[Outcome]
) -> None:
    one = alone[CASES.index(case)]
    ranks = [outcomes[CASES.index(case)] for outcomes in many]
    ours, theirs = determined(case.objective, ranks[0].weights, one.weights)
    assert largest_difference(ours, theirs) < 1e-12  # 2e-14 where last measured
    for rank in ranks[1:]:
        assert alike(rank.weights, ranks[0].weights)
    for number, expected in enumerate(one.terms):
        for rank in ranks:
            assert rank.terms[number].keys() == expected.keys()
        for name, term in expected.items():
            total = sum(rank.terms[number][name].item() for rank in ranks)
            free = case.objective in DIFFERENCES and name in OF_SCORES
            beside = 1e-10 if free else 1e-13
            assert total == pytest.approx(term.item(), rel=1e-12, abs=beside)


def assert_plain(**fields: Any) -> list[LossTerms]:
    """Three steps, the last on a short batch, are the plain ones; returns their terms."""
    ours = made(**fields)
    objective = ours.config.losses.objective
    plain = Plain(ours.config, ours)
    terms = step(ours, 0, 1, 2)
    for number, seen in enumerate(terms):
        labelled = ours.config.condition != "none"
        expected = plain.step(global_batch(number, "labels", labelled))
        for name, term in seen.items():
            free = objective in DIFFERENCES and name in OF_SCORES
            beside = 1e-9 if free else 1e-12
            assert term.item() == pytest.approx(expected[name], rel=1e-10, abs=beside)
    weights, expected_weights = determined(objective, weights_of(ours), weights_of(plain))
    assert largest_difference(weights, expected_weights) < 1e-10
    assert largest_difference(weights_of(ours), weights_of(made(**fields))) > 1e-4  # they did move
    return terms


@pytest.mark.parametrize("d_steps", [1, 2])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_step_is_the_plain_one(objective: str, d_steps: int) -> None:
    losses = {"pair": 0.7, "temperature": 0.5, "reconstruction": 2.0, "pair_confusion": 0.6}
    losses |= {"uniformity": 0.4, "gradient_penalty": 3.0}
    terms = assert_plain(
        losses={"objective": objective, "adversarial": 0.9, "contrastive": 1.3, **losses},
        optimizer={"d_steps": d_steps, "lr_g": 3e-4, "lr_d": 7e-4, "beta1": 0.4, "beta2": 0.95},
    )
    named = {"d/adversarial", "d/contrastive", "d/pair", "d/approximate_r1", "d/gradient_penalty"}
    named |= {"score/real", "score/fake"}
    named |= {"g/adversarial", "g/reconstruction", "g/pair_confusion", "g/uniformity"}
    assert all(seen.keys() == named for seen in terms)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_an_exact_penalty_is_the_plain_one(penalty: str) -> None:
    terms = assert_plain(losses={penalty: 2.5, "objective": "relativistic"})
    assert all(seen[f"d/{penalty}"] > 0 for seen in terms)


@pytest.mark.parametrize("objective", ["non-saturating", "relativistic"])
@pytest.mark.parametrize("condition", ["classifier", "projection"])
def test_a_step_with_labels_is_the_plain_one(condition: str, objective: str) -> None:
    losses = {"objective": objective, "r1": 0.5, "gradient_penalty": 0.3}
    losses |= {"classification": 0.8} if condition == "classifier" else {}
    terms = assert_plain(losses=losses, condition=condition)
    named = {"d/classification", "g/classification"} if condition == "classifier" else set()
    assert all({n for n in seen if "classification" in n} == named for seen in terms)


@pytest.mark.parametrize("augment", [{}, {"shift": 0.2, "rotate": 30.0, "erase": 0.2}])
@pytest.mark.parametrize("condition", ["none", "classifier", "projection"])
def test_a_step_in_contrad_s_form_is_the_plain_one(
    condition: str, augment: dict[str, float]
) -> None:
    losses = {"form": "contrad", "fakes": 0.7, "temperature": 0.4, "r1": 0.2}
    terms = assert_plain(losses=losses, condition=condition, augment=augment)
    assert all(seen["d/fakes"] > 0 for seen in terms)


@pytest.mark.parametrize("objective", ["non-saturating", "relativistic"])
def test_a_step_in_which_d_sees_views_is_the_plain_one(objective: str) -> None:
    augment = {"shift": 0.1, "scale": 0.2, "warp": 0.1}
    penalties = {"r1": 0.5, "r2": 0.5, "gradient_penalty": 0.3}
    whole = assert_plain(
        losses={"objective": objective, **penalties}, augment=augment, optimizer={"d_steps": 2}
    )
    bare = step(made(losses={"objective": objective, **penalties}, optimizer={"d_steps": 2}), 0)
    assert whole[0]["d/adversarial"] != bare[0]["d/adversarial"]
    assert whole[0]["g/reconstruction"] == pytest.approx(bare[0]["g/reconstruction"].item())


def test_contrad_s_features_learn_nothing_from_the_score() -> None:
    zero = dict.fromkeys(["fakes", "pair", "approximate_r1"], 0.0)
    nothing = 1e-30  # as good as: none of them 0 would leave features that learn nothing at all
    gan = made(losses={"form": "contrad", "contrastive": nothing, **zero})
    before = weights_of(gan)
    step(gan, 0)
    after = weights_of(gan)
    changed = {n for n in before if (before[n] - after[n]).abs().max() > 1e-15}
    of_d = {n.removeprefix("discriminator.") for n in changed if n.startswith("discriminator.")}
    assert of_d == {"judge.0.weight", "judge.0.bias", "score.weight", "score.bias"}


@pytest.mark.parametrize("fields", [{}, {"form": "contrad"}])
def test_bfloat16_comes_near_float32_with_labels_and_views(fields: dict[str, Any]) -> None:
    fields = {"augment": {"shift": 0.2, "warp": 0.1}, "condition": "classifier", "losses": fields}
    half, single = made(torch.bfloat16, **fields), made(torch.float32, **fields)
    for seen, expected in zip(step(half, 0, 1, 2), step(single, 0, 1, 2), strict=True):
        for name, term in seen.items():
            assert term.item() == pytest.approx(expected[name].item(), rel=0.03, abs=0.03)


def test_classes_go_with_a_condition() -> None:
    with pytest.raises(UserError, match=r"condition 'projection' goes with 0 classes: give"):
        ContrastiveGAN(small(condition="projection"), SHAPE)
    with pytest.raises(UserError, match=r"condition 'none' goes with 3 classes: give"):
        ContrastiveGAN(small(), SHAPE, classes=CLASSES)


def test_embedding_images_leaves_d_as_it_is() -> None:
    gan = made(discriminator={**D, "spectral_norm": True})
    step(gan, 0)
    before = {n: b.clone() for n, b in gan.discriminator.state_dict().items()}
    images = global_batch(1, "views").positive
    embedded = gan.embed(images)
    assert alike(before, gan.discriminator.state_dict())
    assert gan.discriminator.training
    assert torch.allclose(embedded.norm(dim=1), torch.ones(len(images), dtype=torch.float64))


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_of_zero_leaves_its_term_out(weight: str) -> None:
    terms = assert_plain(losses={weight: 0.0})
    if weight not in ("adversarial", "reconstruction"):  # these cost nothing to know
        assert not [name for seen in terms for name in seen if name.endswith(f"/{weight}")]


def test_gs_step_leaves_d_alone() -> None:
    # G's loss goes through D, which has none of its own.
    gan = made(losses=dict.fromkeys(WEIGHTS[:4], 0.0))
    before = weights_of(gan)
    step(gan, 0, 1)
    assert moved(before, gan) == {"generator", "ema_generator"}


def test_ds_step_leaves_g_alone() -> None:
    # D's loss looks at the fakes, and G has none of its own.
    weights = ["adversarial", "reconstruction", "pair_confusion", "uniformity"]
    gan = made(losses=dict.fromkeys(weights, 0.0))
    before = weights_of(gan)
    step(gan, 0, 1)
    assert moved(before, gan) == {"discriminator"}


def test_the_averaged_g_follows_by_a_decay_that_ramps_up_to_its_bound() -> None:
    gan = made(optimizer={"average": 0.2})
    ema_generator = {n: w.clone() for n, w in gan.ema_generator.named_parameters()}
    for number, decay in enumerate([1 / 10, 2 / 11, 0.2, 0.2]):  # the third would be 3 / 12
        step(gan, number)
        for name, weight in gan.generator.named_parameters():
            ema_generator[name] = decay * ema_generator[name] + (1 - decay) * weight.detach()
            ours = gan.ema_generator.get_parameter(name)
            assert torch.allclose(ours, ema_generator[name], rtol=0, atol=1e-15)
    assert not any(weight.requires_grad for weight in gan.ema_generator.parameters())


def test_bfloat16_keeps_float32_weights_and_comes_near_float32() -> None:
    half, single = made(torch.bfloat16), made(torch.float32)
    ours, theirs = step(half, 0, 1, 2), step(single, 0, 1, 2)
    for seen, expected in zip(ours, theirs, strict=True):
        for name, term in seen.items():
            assert term.item() == pytest.approx(expected[name].item(), rel=0.03, abs=0.03)
    assert ours[0]["d/contrastive"] != theirs[0]["d/contrastive"]  # it was computed otherwise
    assert {weight.dtype for weight in weights_of(half).values()} == {torch.float32}
    states = [half.g_optimizer.state_dict(), half.d_optimizer.state_dict()]
    moments = [m for state in states for weight in state["state"].values() for m in weight.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_under_bfloat16_penalties_are_float32_s() -> None:
    losses = dict.fromkeys(PENALTIES, 1.0) | {"r1_spread": 0.001}
    half, single = made(torch.bfloat16, losses=losses), made(torch.float32, losses=losses)
    fields = {"r1": 1e-5, "approximate_r1": 1e-3}  # of real images, from the same weights
    fields |= {"r2": 0.03, "gradient_penalty": 0.03}  # of fakes, which bfloat16 made
    (ours,), (theirs,) = step(half, 0), step(single, 0)
    for name, near in fields.items():
        assert ours[f"d/{name}"].item() == pytest.approx(theirs[f"d/{name}"].item(), rel=near)


def test_a_style_based_step_draws_noise_for_each_layer_and_styles_to_mix() -> None:
    gan = made(generator={**G, "family": "style"})
    generator, batch = gan.generator, global_batch(0, "views")
    with torch.no_grad():
        for layer in generator.decoder.layers:  # type: ignore[union-attr]
            layer.strength.fill_(1.0)  # at first noise counts for nothing
    config, pairs, cpu = gan.config, len(batch.present), torch.device("cpu")
    chance = sample_step_noise(config, SHAPE, generator.extras, 0, 0, pairs, cpu, torch.float64)
    images = to_unit(torch.cat([batch.positive, batch.negative]), torch.float64)
    present = batch.present.repeat(2)
    errors = []
    for drawn in (chance.extras, None):
        fakes, _ = generator(images, chance.noise, chance.moves, drawn)
        error = (fakes[: len(images)] - images).abs().flatten(1).mean(1)
        errors.append(error[present].mean().item())
    (terms,) = step(gan, 0)
    assert terms["g/reconstruction"].item() == pytest.approx(errors[0], rel=1e-10)
    assert terms["g/reconstruction"].item() != pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        (torch.float32, {}),
        (torch.float64, {}),
        (torch.bfloat16, {}),
        (torch.float32, NORMED),
        (torch.float32, STYLED),
    ],
    ids=["float32", "float64", "bfloat16", "spectral norm", "style and contrad"],
)
def test_it_goes_on_from_its_state_bit_for_bit(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    whole = made(dtype, **fields)
    step(whole, 0, 1)
    packed = pack(whole.state_dict())
    expected = step(whole, 2, 3)
    again = made(dtype, **fields | {"seed": 9})  # whose buffers start otherwise
    again.config = whole.config
    step(again, 7)  # what it did before is forgotten
    again.load_state_dict(unpack(packed))
    assert alike(unpack(packed), again.state_dict())
    assert alike(step(again, 2, 3), expected)
    assert alike(again.state_dict(), whole.state_dict())


def test_chance_follows_from_seed_and_step_alone() -> None:
    def weights(seed: int, *, steps: int, other_chance: int) -> dict[str, torch.Tensor]:
        """After one batch, from the same weights, as step number `steps` of that seed."""
        gan = made(seed=seed)
        start = made(seed=0).state_dict()
        torch.manual_seed(other_chance)
        torch.rand(other_chance)
        state = torch.random.get_rng_state()
        for number in range(other_chance):
            step(gan, number)
        gan.load_state_dict({**start, "steps": steps})
        step(gan, 4)
        assert torch.equal(torch.random.get_rng_state(), state)  # nor does it touch others'
        return {n: w for n, w in weights_of(gan).items() if "ema_generator" not in n}

    first = weights(5, steps=6, other_chance=1)
    assert alike(weights(5, steps=6, other_chance=2), first)
    assert not alike(weights(5, steps=7, other_chance=1), first)
    assert not alike(weights(8, steps=6, other_chance=1), first)


def test_networks_start_from_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = weights_of(made())
    torch.manual_seed(2)
    assert alike(weights_of(made()), first)
    assert not alike(weights_of(made(seed=4)), first)


NOTEBOOK = """
import math, sys
from cl_ray import checkpoint
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import ResidentShard
from cl_ray.data.partition import Share
from cl_ray.trainer import Run

small = {"depth": 2, "width": 4}
config = Config(data=sys.argv[1], batch_size=16, generator=small, discriminator=small)
run = Run(config, ResidentShard.read(Share(Dataset.open(config.data), config)))
metrics = run.train_epoch()
assert run.gan.steps == 3 and math.isfinite(metrics["d/contrastive"])
print([name for name in sys.modules if name.split(".")[0] == "ray"])
"""


def test_a_notebook_trains_without_ray(make_digits: Callable[[int], str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", NOTEBOOK, make_digits(48)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
