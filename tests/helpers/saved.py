"""Checkpoints of a small run's steps, to be saved and looked at."""

from typing import Any

from cl_ray.checkpoint import CheckpointStore
from cl_ray.gan import ContrastiveGAN
from helpers.five_steps import SHAPE, small
from helpers.states import alike

States = dict[int, dict[str, Any]]
ABOUT = {"config": small().to_yaml(), "shape": list(SHAPE), "classes": [], "counts": []}
FILES = ["generator.safetensors", "discriminator.safetensors", "state.pt"]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def gan() -> ContrastiveGAN:
    shallow = {"depth": 1, "width": 4}
    return ContrastiveGAN(small(generator=shallow, discriminator=shallow), SHAPE)


def save(checkpoints: CheckpointStore, states: States, metrics: dict[int, float | None]) -> None:
    """Save the steps that have a figure, one after another."""
    for step, figure in metrics.items():
        name = checkpoints.save(states[step], epoch=step // 2, step=step, metric=figure)
        assert name == name_of(step)


def steps_of(checkpoints: CheckpointStore) -> list[int]:
    return [manifest.step for manifest in checkpoints.list()]


def assert_whole(checkpoints: CheckpointStore, states: States, *steps: int) -> None:
    """These and no others are there, each as it was saved."""
    assert steps_of(checkpoints) == list(steps)
    for step in steps:
        assert alike(checkpoints.load(name_of(step)), states[step])
        checkpoints.check(name_of(step))
