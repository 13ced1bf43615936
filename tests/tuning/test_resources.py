"""How many trials there is room for, asked of a real Ray with so many CPUs and GPUs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.machine import machine

from cl_ray.errors import UserError
from cl_ray.training.resources import WorkerResources
from cl_ray.tuning.prepare import prepare_search
from cl_ray.tuning.resources import TrialResources, allocate_trials

Share = Callable[..., TrialResources]


@pytest.fixture
def share(flags: list[str], tmp_path: Path) -> Share:
    """Shares the machine out among four trials of a search with these flags."""

    def asked(*more: str, local: bool = True) -> TrialResources:
        search = prepare_search([*flags, f"--storage={tmp_path}", "--trials=4", *more], "search")
        return allocate_trials(search, local)

    return asked


def refused(share: Share, *more: str, local: bool = True) -> str:
    with pytest.raises(UserError) as caught:
        share(*more, local=local)
    return str(caught.value)


def test_one_gpu_is_shared_by_a_trial_s_workers(share: Share) -> None:
    with machine(cpus=16, gpus=1):
        assert share() == TrialResources(1, 1, WorkerResources(16, 1, 16, None))
        assert share("--workers=2") == TrialResources(1, 2, WorkerResources(8, 0.5, 8, None))
        assert share("--concurrent=4") == TrialResources(4, 1, WorkerResources(4, 0.25, 4, None))
        assert share("--gpus-per-trial=0.25") == TrialResources(
            4, 1, WorkerResources(4, 0.25, 4, None)
        )
        assert share("--gpus-per-trial=0.5", "--workers=2") == TrialResources(
            2, 2, WorkerResources(4, 0.25, 4, None)
        )
        assert share("--set=device=cpu", "--workers=2") == TrialResources(
            4, 2, WorkerResources(2, 0, 2, None)
        )
        assert share("--workers=2", local=False) == TrialResources(
            4, 2, WorkerResources(1, 0, 1, None)
        )
        flags = ("--workers=2", "--gpus-per-trial=1", "--concurrent=3")
        assert refused(share, *flags) == (
            "concurrent 3 with 2 workers of 0.5 GPU each need 3 GPU; the cluster has 1: take "
            "--concurrent 1, or a smaller --gpus-per-trial."
        )


def test_neither_cpus_nor_gpus_are_given_twice(share: Share) -> None:
    with machine(cpus=2, gpus=4):
        assert share() == TrialResources(2, 1, WorkerResources(1, 1, 1, None))
        assert share("--workers=2") == TrialResources(1, 2, WorkerResources(1, 1, 1, None))
        assert share("--cpus-per-trial=0.5") == TrialResources(
            4, 1, WorkerResources(0.5, 1, 1, None)
        )
        assert share("--gpus-per-trial=2", local=False) == TrialResources(
            2, 1, WorkerResources(1, 2, 1, None)
        )
        assert share("--gpus-per-trial=4", local=False) == TrialResources(
            1, 1, WorkerResources(1, 4, 1, None)
        )
        # A worker is never split over two GPUs.
        part = ("--cpus-per-trial=0.2", "--gpus-per-trial=0.6", "--concurrent=5")
        assert refused(share, *part) == (
            "concurrent 5 with 0.2 CPU and 0.6 GPU each do not fit: the cluster's nodes, 1 of "
            "them, have room for 4: take --concurrent 4, or give each less."
        )
        one = ("--workers=5", "--cpus-per-trial=1", "--gpus-per-trial=3", "--set=batch_size=40")
        assert refused(share, *one) == (
            "concurrent 1 with 5 workers of 0.2 CPU and 0.6 GPU each do not fit: the cluster's "
            "nodes, 1 of them, have room for 4: give each less."
        )


def test_what_a_trial_has_is_divided_among_its_workers(share: Share) -> None:
    with machine(cpus=4, gpus=0):
        assert share("--workers=2", "--cpus-per-trial=4") == TrialResources(
            1, 2, WorkerResources(2, 0, 2, None)
        )
        assert share("--workers=2", "--cpus-per-trial=2") == TrialResources(
            2, 2, WorkerResources(1, 0, 1, None)
        )
        assert share("--workers=4", "--cpus-per-trial=1.4") == TrialResources(
            2, 4, WorkerResources(0.35, 0, 1, None)
        )
        # The ways out of what does not fit lead out.
        assert refused(share, "--workers=8") == (
            "concurrent 1 with 8 workers of 1 CPU each need 8 CPU; the cluster has 4: take "
            "--workers 4, or a smaller --cpus-per-trial."
        )
        assert share("--workers=4") == TrialResources(1, 4, WorkerResources(1, 0, 1, None))
        assert refused(share, "--workers=8", "--concurrent=2") == (
            "concurrent 2 with 8 workers of 1 CPU each need 16 CPU; the cluster has 4: take "
            "--concurrent 1 with --workers 4, or a smaller --cpus-per-trial."
        )
        assert refused(share, "--workers=4", "--cpus-per-trial=8") == (
            "concurrent 1 with 4 workers of 2 CPU each need 8 CPU; the cluster has 4: take a "
            "smaller --cpus-per-trial."
        )
        for local in (True, False):  # where the cluster has no GPU
            assert refused(share, "--gpus-per-trial=1", local=local) == (
                "concurrent 1 with 1 GPU each need 1 GPU; the cluster has 0: take a smaller "
                "--gpus-per-trial."
            )
