"""Checkpoints of a small run's steps, to be saved and looked at."""

from typing import Any

from five_steps import SHAPE, small
from states import alike

from cl_ray.adversary import Adversary
from cl_ray.checkpoint import Checkpoints

States = dict[int, dict[str, Any]]
ABOUT = {"config": small().to_yaml(), "shape": list(SHAPE), "classes": [], "counts": []}
FILES = ["generator.safetensors", "discriminator.safetensors", "state.pt"]


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def adversary() -> Adversary:
    shallow = {"depth": 1, "width": 4}
    return Adversary(small(generator=shallow, discriminator=shallow), SHAPE)


def save(checkpoints: Checkpoints, states: States, figures: dict[int, float | None]) -> None:
    """Save the steps that have a figure, one after another."""
    for step, figure in figures.items():
        name = checkpoints.save(states[step], epoch=step // 2, step=step, figure=figure)
        assert name == name_of(step)


def steps_of(checkpoints: Checkpoints) -> list[int]:
    return [manifest.step for manifest in checkpoints.list()]


def assert_whole(checkpoints: Checkpoints, states: States, *steps: int) -> None:
    """These and no others are there, each as it was saved."""
    assert steps_of(checkpoints) == list(steps)
    for step in steps:
        assert alike(checkpoints.load(name_of(step)), states[step])
        checkpoints.check(name_of(step))
