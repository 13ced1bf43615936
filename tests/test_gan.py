"""The training step: equal on any number of workers, equal to a naive one, and resumable."""

import copy
import subprocess
import sys
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from helpers import five_steps
from helpers.five_steps import (
    CASES,
    CLASSES,
    PAIRS,
    SHAPE,
    Case,
    D,
    G,
    Outcome,
    global_batch,
    largest_difference,
    move_batch,
    small_config,
    take_five_steps,
    weights_of,
)
from helpers.naive_gan import NaiveGAN
from helpers.ranks import run_on_ranks
from helpers.states import pack, states_equal, unpack
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

from cl_ray import distributed
from cl_ray.batch import Losses
from cl_ray.cuda_graph import WARMUP_CALLS, GraphedStep, release_graphs
from cl_ray.errors import UserError
from cl_ray.gan import ContrastiveGAN
from cl_ray.losses.adversarial import OBJECTIVES, Scores
from cl_ray.losses.contrastive import view_losses
from cl_ray.losses.uniformity import uniformity
from cl_ray.networks.normalize import to_unit
from cl_ray.step_noise import sample_step_noise

D_WEIGHTS = ["adversarial", "contrastive", "pair", "approximate_r1"]
G_WEIGHTS = ["adversarial", "reconstruction", "pair_confusion", "uniformity"]
EXACT_PENALTIES = ["r1", "r2", "gradient_penalty"]


def loss_of_d(objective: str, shift: float) -> float:
    scores = torch.tensor([[0.0], [2.0], [5.0]]) + shift
    return OBJECTIVES[objective](Scores(scores, scores[:2]), "discriminator").item()


OF_SCORE_DIFFERENCES = {o for o in OBJECTIVES if loss_of_d(o, 7) == pytest.approx(loss_of_d(o, 0))}
"""Objectives that depend on differences of scores only, so the bias of D's score is free: its
gradient is rounding, which Adam scales up to steps of 1e-12."""
OF_SCORES = {"score/real", "score/fake", "g/adversarial"}
SPECTRAL_NORM = {"discriminator": {**D, "spectral_norm": True}, "optimizer": {"d_steps": 2}}
STYLE = {"generator": {**G, "family": "style"}, "losses": {"form": "contrad"}}
AUGMENT = {"shift": 0.2, "rotate": 30.0, "warp": 0.1, "erase": 0.2, "crop": 0.3, "contrast": 0.3}


def build(dtype: torch.dtype = torch.float64, **fields: Any) -> ContrastiveGAN:
    return five_steps.build_gan(small_config(**fields), dtype)


def train(gan: ContrastiveGAN | NaiveGAN, *numbers: int, unlabelled: bool = False) -> list[Any]:
    """Train on the batches of these numbers; return the metrics of each step."""
    labelled = gan.config.condition != "none"
    batches = (global_batch(number, "labels", labelled, unlabelled) for number in numbers)
    return [gan.train_step(batch) for batch in batches]


def without_free(objective: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    free = {"discriminator.score.bias"} if objective in OF_SCORE_DIFFERENCES else set()
    return {name: weight for name, weight in weights.items() if name not in free}


@pytest.fixture(scope="module")
def one_rank() -> list[Outcome]:
    return take_five_steps(CASES)


@pytest.fixture(scope="module", params=[2, 3])
def ranks(request: pytest.FixtureRequest) -> list[list[Outcome]]:
    """Each rank's outcome of each case."""
    return run_on_ranks(take_five_steps, request.param, CASES)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_n_workers_take_the_same_step_as_one(
    case: Case, ranks: list[list[Outcome]], one_rank: list[Outcome]
) -> None:
    one = one_rank[CASES.index(case)]
    outcomes = [outcomes[CASES.index(case)] for outcomes in ranks]
    ours, theirs = (without_free(case.objective, o.weights) for o in (outcomes[0], one))
    # 3e-12 when last measured: Muon multiplies the rounding errors of small gradients.
    assert largest_difference(ours, theirs) < 1e-11
    assert all(states_equal(outcome.weights, outcomes[0].weights) for outcome in outcomes)
    for number, expected in enumerate(one.metrics):
        parts = [outcome.metrics[number] for outcome in outcomes]
        assert all(part.keys() == expected.keys() for part in parts)
        for name, value in expected.items():
            is_free = case.objective in OF_SCORE_DIFFERENCES and name in OF_SCORES
            tolerance = 1e-10 if is_free else 1e-11
            total = sum(part[name].item() for part in parts)
            assert total == pytest.approx(value.item(), rel=1e-11, abs=tolerance)


LARGE = [case for case in CASES if case.d_steps == 2 or case.contrad]


def take_steps_of_a_large_batch() -> list[Outcome]:
    """Take the steps of `LARGE` as of a batch whose losses the ranks divide among them."""
    distributed.SAME_LOSS_PAIRS = 0
    return take_five_steps(LARGE)


def test_two_workers_take_the_same_step_of_a_large_batch(one_rank: list[Outcome]) -> None:
    expected = [one_rank[CASES.index(case)] for case in LARGE]
    for outcomes in run_on_ranks(take_steps_of_a_large_batch, 2):
        for case, ours, theirs in zip(LARGE, outcomes, expected, strict=True):
            weights = (without_free(case.objective, o.weights) for o in (ours, theirs))
            assert largest_difference(*weights) < 1e-11


class CollectiveCounter(TorchDispatchMode):
    """Records each operation of torch.distributed, and the bytes that this rank hands in."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[str, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            sent = args[1 if name == "allgather_" else 0]
            self.operations.append((name, sum(tensor.nbytes for tensor in sent)))
        return func(*args, **(kwargs or {}))


def count_collectives() -> tuple[list[tuple[str, int]], list[int]]:
    """Return the collective operations of two steps of D and one of G; bytes of D and G."""
    gan = build(torch.float32, optimizer={"d_steps": 2})
    ranks = distributed.world()[1]
    batch = move_batch(global_batch(0, "views"), "cpu", slice(PAIRS // ranks))
    with CollectiveCounter() as counter:
        gan.train_step(batch)
    networks = (gan.discriminator, gan.generator)
    return counter.operations, [sum(p.nbytes for p in n.parameters()) for n in networks]


def test_a_step_of_each_network_has_one_all_reduce_and_that_of_d_one_all_gather() -> None:
    for operations, (d_bytes, g_bytes) in run_on_ranks(count_collectives, 2):
        # Six embeddings of 8 and two latent vectors of 8 float32 numbers a pair.
        of_d = [("allgather_", PAIRS // 2 * (6 * 8 + 2 * 8) * 4), ("allreduce_", d_bytes)]
        assert operations == [*of_d * 2, ("allreduce_", g_bytes)]


class CPUGraph:
    """Stands in for a CUDA graph: a replay computes the same function into the same result."""

    def __init__(self, function: Callable[[], Tensor]):
        self.function, self.values = function, function()
        self.replays, self.is_freed = 0, False

    def replay(self) -> None:
        self.replays += 1
        if self.replays > 1:  # unlike the capture of a CUDA graph, this one has computed
            self.values.copy_(self.function())

    def reset(self) -> None:
        self.is_freed = True


def record_on_cpu(function: Callable[[], Tensor]) -> tuple[CPUGraph, Tensor]:
    graph = CPUGraph(function)
    return graph, graph.values


def train_recorded() -> list[tuple[dict[str, Tensor], list[Losses]]]:
    """Train with eager and with recorded steps; returns weights and metrics."""
    rank, workers = distributed.world()
    rows = slice(rank * PAIRS // workers, (rank + 1) * PAIRS // workers)
    outcomes = []
    for enabled in (False, True):
        batches = [move_batch(global_batch(number, "views"), "cpu", rows) for number in range(8)]
        given = [images.clone() for batch in batches for images in batch[:4]]
        gan = build(optimizer={"d_steps": 2})
        step = gan._graphed_update = GraphedStep(gan.update_networks, enabled, record_on_cpu)
        metrics = [gan.train_step(batch) for batch in batches]
        outcomes.append((weights_of(gan), metrics))
        graphs: list[Any] = [captured.graph for captured in step.graphs.values()]
        assert [graph.replays for graph in graphs] == [len(batches) - WARMUP_CALLS] * enabled
        assert states_equal([images for batch in batches for images in batch[:4]], given)
        release_graphs()
        assert not step.graphs
        assert all(graph.is_freed for graph in graphs)
    return outcomes


def test_recorded_steps_of_two_workers_equal_eager_ones() -> None:
    for eager, recorded in run_on_ranks(train_recorded, 2):
        assert states_equal(recorded, eager)


def test_noise_that_is_drawn_ahead_is_that_of_its_step() -> None:
    """As on a GPU, where `prepare` draws; also after a checkpoint of another step is loaded."""
    ahead, plain = build(), build()
    drawn: list[int] = []

    def prepare(step: int, batch_size: int) -> None:
        drawn.append(step)
        noise = ahead._noise._draw(step, batch_size)
        ahead._noise._prepared = {(step, batch_size): noise}

    ahead._noise.prepare = prepare  # type: ignore[method-assign]
    state = copy.deepcopy(plain.state_dict())
    for number in (0, 1):
        assert states_equal(train(ahead, number), train(plain, number))
    assert drawn == [1, 2]
    for gan in (ahead, plain):
        gan.load_state_dict(state)
    assert states_equal(train(ahead, 0), train(plain, 0))
    assert states_equal(weights_of(ahead), weights_of(plain))


def test_a_destroyed_process_group_ends_the_training() -> None:
    batch = move_batch(global_batch(0, "views"), "cpu", slice(PAIRS // 2))
    with pytest.raises(RuntimeError, match="of 2 workers, but the process group has 1"):
        build().train_step(batch)


def assert_naive(unlabelled: bool = False, **fields: Any) -> list[Losses]:
    """Check that three steps, the last on a short batch, equal the naive ones."""
    gan = build(**fields)
    objective = gan.config.losses.objective
    naive = NaiveGAN(gan.config, gan)
    start = weights_of(gan)
    steps, expected = (train(g, 0, 1, 2, unlabelled=unlabelled) for g in (gan, naive))
    for step, naive_step in zip(steps, expected, strict=True):
        assert list(step) == gan.config.loss_names(unlabelled)
        for name, value in step.items():
            is_free = objective in OF_SCORE_DIFFERENCES and name in OF_SCORES
            tolerance = 1e-9 if is_free else 1e-12
            assert value.item() == pytest.approx(naive_step[name], rel=1e-10, abs=tolerance)
    ours, theirs = (without_free(objective, weights_of(g)) for g in (gan, naive))
    assert largest_difference(ours, theirs) < 1e-10
    assert largest_difference(weights_of(gan), start) > 1e-4  # they did change
    return steps


@pytest.mark.parametrize(
    ("objective", "algorithm"), [*product(OBJECTIVES, ["muon"]), ("non-saturating", "adam")]
)
def test_step_equals_the_naive_one(objective: str, algorithm: str) -> None:
    losses = {"pair": 0.7, "temperature": 0.5, "reconstruction": 2.0, "pair_confusion": 0.6}
    losses |= {"uniformity": 0.4, "gradient_penalty": 3.0, "adversarial": 0.9, "contrastive": 1.3}
    optimizer = {"algorithm": algorithm, "lr_g": 3e-4, "lr_d": 7e-4, "beta1": 0.4, "beta2": 0.95}
    optimizer |= {"weight_decay_g": 0.8, "weight_decay_d": 0.3} if algorithm == "muon" else {}
    steps = assert_naive(losses={"objective": objective, **losses}, optimizer=optimizer)
    names = {f"d/{name}" for name in (*D_WEIGHTS, "gradient_penalty")}
    names |= {f"g/{name}" for name in G_WEIGHTS} | {"score/real", "score/fake"}
    for step in steps:
        assert step.keys() == names


@pytest.mark.parametrize("penalty", EXACT_PENALTIES)
def test_step_with_an_exact_penalty_equals_the_naive_one(penalty: str) -> None:
    steps = assert_naive(losses={penalty: 2.5, "objective": "relativistic"})
    assert all(step[f"d/{penalty}"] > 0 for step in steps)


@pytest.mark.parametrize(
    ("condition", "objective"), [("classifier", "non-saturating"), ("projection", "relativistic")]
)
def test_conditional_step_equals_the_naive_one(condition: str, objective: str) -> None:
    losses = {"objective": objective, "r1": 0.5, "gradient_penalty": 0.3}
    losses |= {"classification": 0.8} if condition == "classifier" else {}
    steps = assert_naive(losses=losses, condition=condition)
    names = {"d/classification", "g/classification"} if condition == "classifier" else set()
    assert all({n for n in step if "classification" in n} == names for step in steps)


@pytest.mark.parametrize(("form", "augment"), [("info-nce", {}), ("contrad", AUGMENT)])
def test_step_with_unlabelled_images_equals_the_naive_one(
    form: str, augment: dict[str, float]
) -> None:
    losses = {"form": form, "classification": 0.8, "consistency": 0.6, "confidence": 0.4}
    steps = assert_naive(
        unlabelled=True, condition="classifier", losses=losses, augment=augment,
        optimizer={"d_steps": 2},
    )  # fmt: skip
    assert all(step["d/consistency"] > 0 for step in steps)


def test_predictions_that_are_never_confident_teach_nothing() -> None:
    step, *_ = assert_naive(unlabelled=True, condition="classifier", losses={"confidence": 1.0})
    assert step["d/consistency"] == 0


@pytest.mark.parametrize(
    ("condition", "augment"), [("none", AUGMENT), ("classifier", {}), ("projection", AUGMENT)]
)
def test_contrad_step_equals_the_naive_one(condition: str, augment: dict[str, float]) -> None:
    losses = {"form": "contrad", "fake_supcon": 0.7, "temperature": 0.4, "r1": 0.2}
    steps = assert_naive(losses=losses, condition=condition, augment=augment)
    assert all(step["d/fake_supcon"] > 0 for step in steps)


def test_augmented_step_equals_the_naive_one() -> None:
    fields: dict[str, Any] = {
        "losses": {"objective": "relativistic", "r1": 0.5, "r2": 0.5, "gradient_penalty": 0.3},
        "optimizer": {"d_steps": 2},
    }
    augmented = assert_naive(**fields, augment=AUGMENT)
    (plain,) = train(build(**fields), 0)
    assert augmented[0]["d/adversarial"] != plain["d/adversarial"]
    # G is not augmented, and its fakes are still those of the first step.
    assert augmented[0]["g/reconstruction"] == pytest.approx(plain["g/reconstruction"].item())


@pytest.mark.parametrize("weight", sorted({*D_WEIGHTS, *G_WEIGHTS}))
def test_loss_of_weight_zero_is_left_out(weight: str) -> None:
    steps = assert_naive(losses={weight: 0.0})
    if weight not in ("adversarial", "reconstruction"):  # these are always reported
        assert not [name for step in steps for name in step if name.endswith(f"/{weight}")]


def test_ema_decay_ramps_up_to_its_bound() -> None:
    gan = build(optimizer={"ema_decay": 0.2})
    expected = {n: w.clone() for n, w in gan.ema_generator.named_parameters()}
    for number, decay in enumerate([1 / 10, 2 / 11, 0.2, 0.2]):  # the third would be 3 / 12
        train(gan, number)
        for name, weight in gan.generator.named_parameters():
            expected[name] = decay * expected[name] + (1 - decay) * weight.detach()
            ema = gan.ema_generator.get_parameter(name)
            assert torch.allclose(ema, expected[name], rtol=0, atol=1e-15)
    assert not any(weight.requires_grad for weight in gan.ema_generator.parameters())


CLASSIFIER = {"augment": AUGMENT, "condition": "classifier"}


@pytest.mark.parametrize(
    "fields",
    [{}, CLASSIFIER, {**CLASSIFIER, "losses": {"form": "contrad"}}],
    ids=["default", "classifier", "contrad"],
)
def test_bfloat16_keeps_float32_weights_and_is_close_to_float32(fields: dict[str, Any]) -> None:
    fields = {"optimizer": {"lr_g": 1e-3, "lr_d": 1e-3}, **fields}
    half, single = build(torch.bfloat16, **fields), build(torch.float32, **fields)
    ours, theirs = train(half, 0, 1, 2), train(single, 0, 1, 2)
    for step, expected in zip(ours, theirs, strict=True):
        for name, value in step.items():
            assert value.item() == pytest.approx(expected[name].item(), rel=0.03, abs=0.03)
    assert ours[0]["d/contrastive"] != theirs[0]["d/contrastive"]  # it was in bfloat16
    assert {weight.dtype for weight in weights_of(half).values()} == {torch.float32}
    states = [half.g_optimizer.state_dict(), half.d_optimizer.state_dict()]
    parts = [part["state"] for state in states for part in state.values()]
    moments = [m for part in parts for weight in part.values() for m in weight.values()]
    assert {moment.dtype for moment in moments} == {torch.float32}


def test_similarities_are_float32_under_bfloat16() -> None:
    vectors = normalize(torch.randn(6, 9, 5, generator=torch.Generator().manual_seed(0)), dim=2)
    gathered = {"contrastive": vectors, "fake_supcon": vectors}
    present = torch.ones(9, dtype=torch.bool)
    expected = view_losses(gathered, present, 0.05) | {"u": uniformity(vectors, present)}
    with torch.autocast("cpu", torch.bfloat16):
        losses = view_losses(gathered, present, 0.05) | {"u": uniformity(vectors, present)}
    assert states_equal(losses, expected)


def test_penalties_are_float32_under_bfloat16() -> None:
    losses = dict.fromkeys(EXACT_PENALTIES, 1.0) | {"r1_step": 0.001}
    half, single = build(torch.bfloat16, losses=losses), build(torch.float32, losses=losses)
    tolerances = {"r1": 1e-5, "approximate_r1": 1e-3}  # at real images
    tolerances |= {"r2": 0.03, "gradient_penalty": 0.03}  # at fakes, which bfloat16 generated
    (ours,), (theirs,) = train(half, 0), train(single, 0)
    for name, rel in tolerances.items():
        assert ours[f"d/{name}"].item() == pytest.approx(theirs[f"d/{name}"].item(), rel=rel)


def test_style_decoder_gets_noise_for_every_layer() -> None:
    gan = build(generator={**G, "family": "style"})
    generator, batch = gan.generator, global_batch(0, "views")
    with torch.no_grad():
        for layer in generator.decoder.layers:  # type: ignore[union-attr]
            layer.strength.fill_(1.0)  # at first noise has no effect
    (noise,) = sample_step_noise(
        gan.config,
        SHAPE,
        generator.decoder_noise_dim,
        0,
        len(batch.positive),
        gan.dtype,
    )
    images = to_unit(torch.cat(batch.real), torch.float64)
    errors = []
    for decoder_noise in (noise.decoder_noise, None):
        fakes, _ = generator(images, noise.z, noise.latent_noise, decoder_noise)
        error = (fakes[: len(images)] - images).abs().flatten(1).mean(1)
        errors.append(error[batch.present[0].repeat(2)].mean().item())
    (metrics,) = train(gan, 0)
    assert metrics["g/reconstruction"].item() == pytest.approx(errors[0], rel=1e-10)
    assert metrics["g/reconstruction"].item() != pytest.approx(errors[1], rel=1e-4)


@pytest.mark.parametrize(
    ("dtype", "fields"),
    [
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, SPECTRAL_NORM),
        (torch.float32, STYLE),
    ],
    ids=["float32", "bfloat16", "spectral norm", "style and contrad"],
)
def test_resumes_bit_for_bit(dtype: torch.dtype, fields: dict[str, Any]) -> None:
    whole = build(dtype, **fields)
    train(whole, 0, 1)
    packed = pack(whole.state_dict())
    expected = train(whole, 2, 3)
    resumed = build(dtype, **fields | {"seed": 9})  # its buffers start differently
    resumed.config, resumed._noise = whole.config, whole._noise
    train(resumed, 7)  # what it did before has no effect
    resumed.load_state_dict(unpack(packed))
    assert states_equal(unpack(packed), resumed.state_dict())
    assert states_equal(train(resumed, 2, 3), expected)
    assert states_equal(resumed.state_dict(), whole.state_dict())


def test_noise_depends_on_seed_and_step_only() -> None:
    def weights(seed: int, *, steps: int, torch_seed: int) -> dict[str, torch.Tensor]:
        """Train one step from the same weights, as step number `steps` of that seed."""
        gan = build(seed=seed)
        torch.manual_seed(torch_seed)
        state = torch.random.get_rng_state()
        train(gan, *range(torch_seed))
        gan.load_state_dict({**build(seed=0).state_dict(), "steps": steps})
        train(gan, 4)
        assert torch.equal(torch.random.get_rng_state(), state)  # the global RNG is left alone
        return {n: w for n, w in weights_of(gan).items() if "ema_generator" not in n}

    first = weights(5, steps=6, torch_seed=1)
    assert states_equal(weights(5, steps=6, torch_seed=2), first)
    assert not states_equal(weights(5, steps=7, torch_seed=1), first)
    assert not states_equal(weights(8, steps=6, torch_seed=1), first)


def test_initial_weights_depend_on_the_seed_only() -> None:
    torch.manual_seed(1)
    first = weights_of(build())
    torch.manual_seed(2)
    assert states_equal(weights_of(build()), first)
    assert not states_equal(weights_of(build(seed=4)), first)


def test_embed_leaves_the_discriminator_unchanged() -> None:
    gan = build(discriminator={**D, "spectral_norm": True})
    train(gan, 0)
    before = {n: b.clone() for n, b in gan.discriminator.state_dict().items()}
    images = global_batch(1, "views").positive
    embeddings = gan.embed(images)
    assert states_equal(before, gan.discriminator.state_dict())
    assert gan.discriminator.training
    assert torch.allclose(embeddings.norm(dim=1), torch.ones(len(images), dtype=torch.float64))


def test_classes_must_fit_the_condition() -> None:
    with pytest.raises(UserError, match=r"condition 'projection' does not fit 0 classes: give"):
        ContrastiveGAN(small_config(condition="projection"), SHAPE)
    with pytest.raises(UserError, match=r"condition 'none' does not fit 3 classes: give"):
        ContrastiveGAN(small_config(), SHAPE, classes=CLASSES)


def test_projection_refuses_images_without_a_label() -> None:
    gan = ContrastiveGAN(small_config(condition="projection"), SHAPE, classes=("a", "b"))
    batch = global_batch(0, "views")
    labels = torch.zeros(len(batch.positive), 2, dtype=torch.int64)
    batch = batch._replace(labels=labels, labelled=labels.bool())
    with pytest.raises(UserError, match="condition projection needs a label of every image"):
        gan.train_step(batch)


NOTEBOOK = """
import math, sys
from cl_ray import checkpoint
from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader
from cl_ray.data.partition import Partition
from cl_ray.trainer import Trainer

small = {"depth": 2, "width": 4}
config = Config(data=sys.argv[1], batch_size=16, generator=small, discriminator=small)
trainer = Trainer(config, InMemoryLoader.read(Partition(Dataset.open(config.data), config)))
metrics = trainer.train_epoch()
assert trainer.gan.steps == 3 and math.isfinite(metrics["d/contrastive"])
print([name for name in sys.modules if name.split(".")[0] == "ray"])
"""


def test_a_notebook_trains_without_ray(make_digits: Callable[[int], str]) -> None:
    command = [sys.executable, "-c", NOTEBOOK, make_digits(48)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
