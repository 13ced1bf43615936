"""States of a small run after each of its steps, and their checkpoints."""

from typing import Any

from cl_ray.checkpoint import CheckpointStore
from cl_ray.gan import ContrastiveGAN
from helpers.five_steps import SHAPE, small_config
from helpers.states import states_equal

States = dict[int, dict[str, Any]]
METADATA = {"config": small_config().to_yaml(), "shape": list(SHAPE), "classes": [], "counts": []}
FILES = ["generator.safetensors", "discriminator.safetensors", "state.pt"]


def checkpoint_name(step: int) -> str:
    return f"step-{step:08d}"


def small_gan() -> ContrastiveGAN:
    shallow = {"depth": 1, "width": 4}
    return ContrastiveGAN(small_config(generator=shallow, discriminator=shallow), SHAPE)


def save_steps(
    checkpoints: CheckpointStore,
    states: States,
    metrics: dict[int, float | None],
    metric_name: str = "loss",
) -> None:
    """Save these steps, each with its metric, one after another."""
    for step, metric in metrics.items():
        about = {"epoch": step // 2, "step": step}
        name = checkpoints.save(states[step], **about, metric=metric, metric_name=metric_name)
        assert name == checkpoint_name(step)


def steps_of(checkpoints: CheckpointStore) -> list[int]:
    return [manifest.step for manifest in checkpoints.list()]


def newest_step(checkpoints: CheckpointStore) -> int | None:
    newest = checkpoints.newest()
    return None if newest is None else newest.step


def assert_complete(checkpoints: CheckpointStore, states: States, *steps: int) -> None:
    """Check that there are checkpoints of these steps and no others, each as it was saved."""
    assert steps_of(checkpoints) == list(steps)
    for step in steps:
        assert states_equal(checkpoints.load(checkpoint_name(step)), states[step])
