"""A GPU gives the results of the CPU, and the commands work on it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.commands import cl_ray, run_flags
from helpers.five_steps import (
    CASES,
    Case,
    build_gan,
    global_batch,
    largest_difference,
    move_batch,
    small_config,
    take_five_steps,
    weights_of,
)
from helpers.ranks import run_on_ranks
from helpers.run_folder import save_run, trained_run

from cl_ray import distributed
from cl_ray.data.dataset import Dataset
from cl_ray.data.loaders import InMemoryLoader, StreamingLoader
from cl_ray.data.partition import Partition
from cl_ray.device import resolve_device
from cl_ray.gan import ContrastiveGAN
from cl_ray.losses.adversarial import OBJECTIVES
from cl_ray.losses.config import RELATIVISTIC, UNBOUNDED
from cl_ray.trainer import Trainer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
FREE = "discriminator.score.bias"
"""Has no effect on objectives of score differences: its gradient is rounding."""


def succeed(*words: str) -> str:
    """Return what a command printed, which must succeed."""
    done = cl_ray(*words)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def digits(make_digits: Any) -> str:
    return make_digits(700)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_steps_equal_those_of_the_cpu(case: Case) -> None:
    (cpu,), (cuda,) = take_five_steps([case]), take_five_steps([case], "cuda")
    for weights in (cpu.weights, cuda.weights):
        weights.pop(FREE)
    # The last two steps are replayed; Adam's kernel reads the learning rate as float32.
    assert largest_difference(cuda.weights, cpu.weights) < 1e-6
    for ours, theirs in zip(cuda.metrics, cpu.metrics, strict=True):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name], rtol=1e-5, atol=1e-6)


def test_replayed_steps_equal_eager_ones() -> None:
    steps = [move_batch(global_batch(number, "views"), "cuda") for number in range(8)]

    def after(use_cuda_graph: bool) -> dict[str, torch.Tensor]:
        gan = build_gan(small_config(), device="cuda")
        assert gan.use_cuda_graph
        gan._graphed_update.enabled = use_cuda_graph
        for number, batch in enumerate(steps):
            gan.set_lr_scale(1 - number / 10)
            gan.train_step(batch)
        return weights_of(gan)

    assert largest_difference(after(use_cuda_graph=True), after(use_cuda_graph=False)) < 1e-9


def train_in_a_group(use_cuda_graph: bool) -> dict[str, torch.Tensor]:
    """Take steps whose collective operations run, in a group of one process."""
    assert distributed.in_process_group()
    gan = build_gan(small_config(optimizer={"d_steps": 2}), device="cuda")
    assert gan.use_cuda_graph
    gan._graphed_update.enabled = use_cuda_graph
    for number in range(8):
        gan.train_step(move_batch(global_batch(number, "views"), "cuda"))
    assert len(gan._graphed_update.graphs) == use_cuda_graph
    return weights_of(gan)


def test_replayed_steps_with_nccl_equal_eager_ones() -> None:
    """The group is destroyed at the end, which would hang if a graph were left."""
    (replayed,) = run_on_ranks(train_in_a_group, 1, True, backend="nccl")
    (eager,) = run_on_ranks(train_in_a_group, 1, False, backend="nccl")
    assert largest_difference(replayed, eager) < 1e-9


def captures() -> bool:
    return build_gan(small_config(), device="cuda").use_cuda_graph


def test_gloo_is_not_captured() -> None:
    assert run_on_ranks(captures, 1) == [False]


def test_two_workers_share_a_gpu() -> None:
    cases = CASES[:3]
    ours = run_on_ranks(take_five_steps, 2, cases, "cuda")[0]
    for one, many in zip(take_five_steps(cases), ours, strict=True):
        assert largest_difference(many.weights, one.weights) < 1e-9


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_bfloat16_is_close_to_float32(objective: str) -> None:
    losses: dict[str, Any] = {"objective": objective}
    losses |= {"gradient_penalty": 2.0} if objective in UNBOUNDED else {}
    losses |= {"r1": 2.0} if objective in RELATIVISTIC else {}
    batch = move_batch(global_batch(0, "views"), "cuda")

    def first(dtype: torch.dtype) -> tuple[ContrastiveGAN, dict[str, torch.Tensor]]:
        gan = build_gan(small_config(losses=losses), dtype, "cuda")
        return gan, gan.train_step(batch)

    (gan, coarse), (_, fine) = first(torch.bfloat16), first(torch.float32)
    assert {weight.dtype for weight in gan.generator.parameters()} == {torch.float32}
    for name, value in fine.items():
        torch.testing.assert_close(coarse[name], value, rtol=0.1, atol=0.05, msg=name)


@pytest.mark.parametrize("negatives", ["far", "hard"])
def test_pairs_equal_those_of_the_cpu(digits: str, negatives: str) -> None:
    fields = {"negatives": negatives, "candidates": 4, "mode": "labels"}
    config = small_config(data=digits, pairs=fields)

    def batches(device: str) -> list[torch.Tensor]:
        shard = InMemoryLoader.read(Partition(Dataset.open(digits), config), device)
        Trainer(config, shard, device, torch.float64)
        return [b.negative.cpu() for b in shard.batches(0)]

    for ours, theirs in zip(batches("cuda"), batches("cpu"), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", [InMemoryLoader, StreamingLoader])
def test_resumes_as_if_never_stopped(
    digits: str, kind: type[InMemoryLoader] | type[StreamingLoader]
) -> None:
    config = small_config(data=digits, epochs=2)

    def run() -> Trainer:
        shard = kind.read(Partition(Dataset.open(digits), config), "cuda")
        return Trainer(config, shard, "cuda", torch.float64)

    whole, begun, again = run(), run(), run()
    whole.train_epoch()
    begun.train_epoch()
    again.load_state_dict(begun.state_dict())
    metrics = whole.train_epoch()
    for name, value in again.train_epoch().items():
        if "/" in name:
            assert value == pytest.approx(metrics[name], rel=1e-9)


def test_visible_gpu_is_used_only_if_allotted() -> None:
    assert resolve_device(gpus=0)[0].type == "cpu"
    assert resolve_device()[0].type == "cuda"
    assert resolve_device(gpus=0.5)[0].type == "cuda"


def test_train_and_evaluate(digits: str, tmp_path: Path) -> None:
    said = succeed("train", *run_flags(tmp_path / "demo", digits), "--epochs=2")
    assert torch.cuda.get_device_name() in said
    summary = json.loads((tmp_path / "demo/summary.json").read_text())
    assert summary["status"] == "finished"
    assert "bfloat16" in summary["device"]


def test_two_workers_train_on_one_gpu(digits: str, tmp_path: Path) -> None:
    flags = ["--workers=2", "--gpus-per-worker=0.5", "--cpus-per-worker=1", "--epochs=1"]
    succeed("train", *run_flags(tmp_path / "two", digits), *flags)
    summary = json.loads((tmp_path / "two/summary.json").read_text())
    assert summary["workers"] == 2
    assert torch.cuda.get_device_name() in summary["device"]


def test_generate_and_embed(digits: str, tmp_path: Path) -> None:
    run = save_run(trained_run(digits), tmp_path, 22)
    for gpus in ("1", "0.5"):
        for words in (["generate", "--count=3000"], ["embed", f"--data={digits}", "--split=train"]):
            out = tmp_path / f"{words[0]}{gpus}.parquet"
            succeed(words[0], str(run), *words[1:], f"--gpus-per-actor={gpus}", f"--out={out}")
            assert list(out.iterdir()) if out.is_dir() else out.stat().st_size
