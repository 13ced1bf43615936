"""The process group of a run's workers, set up and destroyed by Ray Train."""

import threading
from pathlib import Path

import pytest
import ray.train
import torch
import torch.distributed as dist
from ray.train.torch import TorchTrainer

from cl_ray.cuda_graph import WARMUP_CALLS, GraphedStep
from cl_ray.training.process_group import ProcessGroupConfig

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("two_cpus")]


@pytest.mark.parametrize("workers", [1, 2])
def test_graphs_are_freed_before_the_group_that_several_workers_have(
    workers: int, tmp_path: Path
) -> None:
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
        scaling_config=ray.train.ScalingConfig(num_workers=workers),
        run_config=ray.train.RunConfig(storage_path=str(tmp_path / "ray")),
    ).fit()
    found = [(tmp_path / str(rank)).read_text() for rank in range(workers)]
    assert found == [f"in a group: {workers > 1}"] * workers
