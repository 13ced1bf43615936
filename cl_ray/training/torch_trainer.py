"""The TorchTrainer that hosts a run on every worker."""

from typing import Any

import ray
import ray.actor
import ray.data
from ray.train import FailureConfig, LoggingConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.ray_shards import DeterministicDataConfig
from cl_ray.storage import RunStorage
from cl_ray.training.failures import WorkerFailureCallback
from cl_ray.training.loop import train_loop_per_worker
from cl_ray.training.progress_actor import ProgressActor
from cl_ray.training.resources import WorkerResources


def start_progress_actor(folder: RunStorage) -> "ray.actor.ActorHandle[Any]":
    """A board on this node: any other may leave the cluster, and the board with it."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    kind = ray.remote(num_cpus=0, scheduling_strategy=here)(ProgressActor)
    return kind.remote(folder.name)


def build_torch_trainer(
    config: Config,
    folder: RunStorage,
    dataset: Dataset,
    capacity: WorkerResources,
    board: "ray.actor.ActorHandle[Any]",
    max_failures: int,
    verbose: bool = False,
    search: str | None = None,
) -> TorchTrainer:
    """A trainer that goes on from the newest checkpoint in the folder.

    Args:
        config: The run's.
        folder: Its folder.
        dataset: What it trains on.
        capacity: What each worker asks for.
        board: Where rank 0 leaves word.
        max_failures: Times that dead workers are started again.
        verbose: Show Ray Train's own messages.
        search: The search that this is a trial of: then the workers ask the board before each
            epoch whether to go on, and evaluate in between.
    """
    each = {"CPU": capacity.cpus, **({"GPU": capacity.gpus} if capacity.gpus else {})}
    return TorchTrainer(
        train_loop_per_worker,
        train_loop_config={
            "config": config,
            "folder": folder,
            "board": board,
            "threads": capacity.threads,
            "gpus": capacity.gpus,
            "search": search,
        },
        # NCCL refuses two workers on one GPU.
        torch_config=TorchConfig(backend="gloo" if capacity.gpus % 1 else None),
        scaling_config=ScalingConfig(
            num_workers=config.workers, use_gpu=capacity.gpus > 0, resources_per_worker=each
        ),
        run_config=RunConfig(
            name=folder.name,
            storage_path=folder.storage,
            failure_config=FailureConfig(max_failures=max_failures),
            callbacks=[WorkerFailureCallback(board)],
            logging_config=LoggingConfig(log_level="INFO" if verbose else "ERROR"),
        ),
        datasets={"train": ray.data.from_items(list(dataset.info.splits))},
        dataset_config=DeterministicDataConfig(dataset, config),
    )
