"""Evaluations during a run: in an actor beside the training if a CPU is free, else in between."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.actor
import torch
from torch import Tensor, nn

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.partition import Partition
from cl_ray.device import keep_freed_memory
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluation, Evaluator
from cl_ray.model import TrainedModel
from cl_ray.prior import Prior
from cl_ray.training.ray_compat import most_free_cpus
from cl_ray.training.resources import EVALUATION_CPUS

ACTOR_START_TIMEOUT = 60.0
"""Seconds that a new actor may take to start before its evaluation is done in this process."""


@dataclass(frozen=True)
class EvaluationRequest:
    """The networks to evaluate.

    Args:
        checkpoint: The checkpoint that holds them.
        generator: The weights of the EMA generator, on the CPU.
        discriminator: The weights of the discriminator, on the CPU.
        prior: What samples are drawn from; None is the training prior.
    """

    epoch: int
    step: int
    checkpoint: str
    generator: dict[str, Tensor]
    discriminator: dict[str, Tensor]
    prior: Prior | None


EvaluationResult = tuple[EvaluationRequest, Evaluation | str]
"""A request and its evaluation, or the reason why there is none."""


class NetworkEvaluator:
    """Evaluates given weights; a Ray actor, or a plain object.

    It is told the run's name, which the dashboard shows, and the CPU threads of a process of its
    own; None leaves this process as it is.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        name: str,
        threads: int | None = None,
        device: torch.device | str = "cpu",
    ):
        if threads:
            torch.set_num_threads(threads)
            keep_freed_memory()
        self.config, self.name, self.device = config, name, torch.device(device)
        self.evaluator = Evaluator(dataset, config.evaluation, seed=config.seed, device=self.device)
        self.partition = Partition(dataset, config)

    def __repr__(self) -> str:
        return f"run {self.name}: evaluation"

    def evaluate(self, request: EvaluationRequest) -> Evaluation | str:
        """Evaluate; return the reason if that is not possible."""
        model = TrainedModel.from_weights(
            self.config,
            self.partition.dataset.info.shape,
            request.generator,
            request.discriminator,
            device=self.device,
            checkpoint=request.checkpoint,
            step=request.step,
            classes=tuple(self.partition.classes),
            counts=tuple(self.partition.counts),
            predicted_labels=self.partition.dataset.info.predicted_labels,
            prior=request.prior,
        )
        try:
            return self.evaluator.evaluate(model)
        except UserError as error:
            return str(error)


class AsyncEvaluator:
    """Evaluates a run's networks, one request at a time. Rank 0 only.

    It reports where evaluations are done: beside the training if they may and a CPU is free, else
    in this process on the device.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        name: str,
        device: torch.device,
        report: Callable[[str], Any],
        beside: bool = True,
    ):
        self.config, self.dataset, self.name = config, dataset, name
        self.device, self.report, self.beside = device, report, beside
        self._results: list[EvaluationResult] = []
        self._pending: tuple[EvaluationRequest, ray.ObjectRef] | None = None
        self._local: NetworkEvaluator | None = None
        self._actor: ray.actor.ActorHandle[Any] | None = None
        least, most = config.worker_range  # an elastic run's workers may need the CPU themselves
        cpus = min(EVALUATION_CPUS, int(most_free_cpus()))
        if beside and config.evaluation.every and least == most and cpus:
            actor_class = ray.remote(num_cpus=cpus)(NetworkEvaluator)
            self._actor = actor_class.remote(config, dataset, name, threads=cpus)
            self._ready = self._actor.__ray_ready__.remote()

    def due(self, epoch: int) -> bool:
        """Whether the networks are evaluated after that many epochs."""
        every = self.config.evaluation.every
        return bool(every) and (epoch % every == 0 or epoch == self.config.epochs)

    def start(self, request: EvaluationRequest) -> None:
        """Start an evaluation beside the training, or do it now.

        It is left out if another one is running, unless it is the last of the run.
        """
        if self._pending and request.epoch < self.config.epochs:
            reason = (
                f"epoch {request.epoch} is not evaluated: the evaluation of epoch "
                f"{self._pending[0].epoch} is still running"
            )
            self._results.append((request, reason))
            return
        self._collect(wait=True)
        self._check_actor()
        if self._actor:
            self._pending = request, self._actor.evaluate.remote(request)
        else:
            self._evaluate_here(request)

    def results(self, wait: bool = False) -> list[EvaluationResult]:
        """The results since the last call; `wait` waits for the evaluation that is running."""
        self._collect(wait)
        results, self._results = self._results, []
        return results

    def _check_actor(self) -> None:
        """Give the actor up if it does not start, and report if there is none."""
        if self._actor and not ray.wait([self._ready], timeout=ACTOR_START_TIMEOUT)[0]:
            ray.kill(self._actor)
            self._actor = None
        if self.beside and self._actor is None and self._local is None:
            self.report("evaluations interrupt the training: no CPU is free beside the workers'")

    def _collect(self, wait: bool) -> None:
        if self._pending is None:
            return
        request, answer = self._pending
        if not ray.wait([answer], timeout=None if wait else 0)[0]:
            return
        self._pending = None
        try:
            self._results.append((request, ray.get(answer)))
        except ray.exceptions.RayError:  # the actor died, by lack of memory or with its node
            self._actor = None
            self._evaluate_here(request)

    def _evaluate_here(self, request: EvaluationRequest) -> None:
        if self._local is None:
            self._local = NetworkEvaluator(self.config, self.dataset, self.name, device=self.device)
        self._results.append((request, self._local.evaluate(request)))


def copy_weights(network: nn.Module) -> dict[str, Tensor]:
    """Copy the weights of a network to the CPU, in float32."""
    return {name: w.detach().float().cpu().clone() for name, w in network.state_dict().items()}
