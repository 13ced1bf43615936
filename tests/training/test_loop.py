"""Ray Train knows a run's checkpoints and resumes it, and sets up the workers' process group."""

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.train
import torch
import torch.distributed as dist
from helpers.run_folder import SMALL_NETWORK
from ray.train.torch import TorchConfig, TorchTrainer

from cl_ray.checkpoint import CheckpointManifest, CheckpointStore
from cl_ray.config import Config
from cl_ray.cuda_graph import WARMUP_CALLS, GraphedStep
from cl_ray.data.dataset import Dataset
from cl_ray.storage import RunStorage
from cl_ray.training.loop import build_torch_trainer, resolve_checkpoint_metric
from cl_ray.training.process_group import ProcessGroupBackend, ProcessGroupConfig
from cl_ray.training.progress import start_progress_actor
from cl_ray.training.resources import WorkerResources

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]


def fit(config: Config, folder: RunStorage) -> tuple[ray.train.Result, list[str]]:
    """Train, and return the result and the messages."""
    folder.write("config.yaml", config.to_yaml().encode())
    progress = start_progress_actor(folder.name)
    resources = WorkerResources(1, 0, 1, None)
    dataset = Dataset.open(config.data)
    trainer = build_torch_trainer(config, folder, dataset, resources, progress, max_failures=0)
    return trainer.fit(), ray.get(progress.state.remote(0))[1]


def test_a_resumed_run_keeps_the_metric_of_its_best_checkpoint() -> None:
    dataset = Dataset.open("mnist")

    def resolve(best: str | None, every: int, **checkpoint: Any) -> str:
        fields = {"evaluation": {"every": every}, "checkpoint": checkpoint}
        found = best and CheckpointManifest(
            name="step-00000001", epoch=1, step=1, metric=1.0, metric_name=best, files={}
        )
        return resolve_checkpoint_metric(Config.model_validate(fields), dataset, found or None)

    assert resolve(None, every=1) == "evaluation/frechet"
    assert resolve(None, every=0) == "g/reconstruction"
    assert resolve("evaluation/frechet", every=0) == "evaluation/frechet"
    assert resolve("g/reconstruction", every=1) == "g/reconstruction"
    assert resolve("evaluation/frechet", every=0, metric="d/pair") == "d/pair"


def test_the_result_points_to_the_newest_checkpoint_also_after_older_ones_are_deleted(
    make_digits: Any, tmp_path: Path
) -> None:
    folder = RunStorage.at(str(tmp_path), "demo")
    config = Config.model_validate(
        {
            "data": make_digits(100), "batch_size": 32, "epochs": 2,
            "generator": SMALL_NETWORK, "discriminator": SMALL_NETWORK,
            "checkpoint": {"keep": 1}, "evaluation": {"every": 0},
        }
    )  # fmt: skip
    store = CheckpointStore(*folder.open())

    def check(result: ray.train.Result, step: int) -> None:
        newest = store.newest()
        assert newest is not None
        assert newest.step == step
        assert result.checkpoint.path == f"{folder.uri}/checkpoints/{newest.name}"
        with result.checkpoint.as_directory() as path:
            assert set(newest.files) < {file.name for file in Path(path).iterdir()}
        assert (
            result.metrics["g/reconstruction"] == result.return_value["metrics"]["g/reconstruction"]
        )

    result, messages = fit(config, folder)
    assert messages[0].endswith("; starts")
    check(result, 8)
    # Ray's list still names the first epoch's, which is gone if it is not the best one.
    for name in store.names()[:-1]:
        store.filesystem.delete_dir(f"{store.folder}/{name}")
    result, messages = fit(config.model_copy(update={"epochs": 3}), folder)
    assert messages[0].endswith("; resumes from step-00000008")
    check(result, 12)


def test_ray_train_takes_the_process_group_for_that_of_pytorch() -> None:
    ours, theirs = ProcessGroupConfig(), TorchConfig()
    for name in ("framework", "train_func_context", "timeout_s", "init_method"):
        assert getattr(ours, name) == getattr(theirs, name)
    backend = theirs.backend_cls()
    assert ProcessGroupBackend().share_cuda_visible_devices == backend.share_cuda_visible_devices


def test_the_controller_of_a_run_starts_without_torch() -> None:
    """What it imports before the workers start: seconds of every run's start."""
    code = "import cl_ray.training.process_group, cl_ray.data.ray_shards, sys; "
    code += "cl_ray.training.process_group.ProcessGroupConfig().framework; "
    command = [sys.executable, "-c", code + "print('torch' in sys.modules)"]
    assert subprocess.run(command, capture_output=True, text=True).stdout == "False\n"


def test_a_single_worker_has_no_process_group() -> None:
    ProcessGroupBackend().on_start([None], ProcessGroupConfig())  # asks nothing of the worker
    assert not dist.is_initialized()


def test_graphs_are_freed_before_the_process_group(tmp_path: Path) -> None:
    def train() -> None:
        rank = ray.train.get_context().get_world_rank()

        class Graph:
            def replay(self) -> None:
                """Nothing is captured."""

            def reset(self) -> None:
                (tmp_path / str(rank)).write_text(f"in a group: {dist.is_initialized()}")

        def double(value: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"double": 2 * value.sum()}

        step = GraphedStep(double, True, lambda function: (Graph(), function()))
        for _ in range(WARMUP_CALLS + 1):
            step(torch.ones(1))
        threading.main_thread().step = step  # type: ignore[attr-defined]  # outlives this function

    TorchTrainer(
        train,
        torch_config=ProcessGroupConfig("gloo"),
        scaling_config=ray.train.ScalingConfig(num_workers=2),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    found = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    assert found == ["in a group: True"] * 2
