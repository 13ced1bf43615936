"""Evaluations while a run trains: in an actor beside it where a CPU is free, else in between."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ray
import ray.actor
import torch
from torch import Tensor

from cl_ray.config import Config
from cl_ray.data.dataset import Dataset
from cl_ray.data.partition import Partition
from cl_ray.device import keep_freed_memory
from cl_ray.errors import UserError
from cl_ray.evaluation.evaluate import Evaluation, Evaluator
from cl_ray.gan import ContrastiveGAN
from cl_ray.model import TrainedModel
from cl_ray.networks.build import build_networks
from cl_ray.prior import Prior

EVALUATION_CPUS = 4
"""The most CPUs that an evaluation beside the training takes, of those that are free."""

PATIENCE = 60.0
"""Seconds that a new actor may take to start before its work is done here."""

Networks = tuple[dict[str, Tensor], dict[str, Tensor]]
"""Weights of the EMA generator and of D, on the CPU."""


class NetworkEvaluator:
    """Evaluates the weights that it is given; an actor, or a plain object.

    Args:
        config: The run's.
        dataset: What it trains on.
        name: The run's, by which the actor is found in the dashboard.
        threads: CPU threads of a process of its own; None leaves this one as it is.
        device: Where the networks compute.
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
        self.shape = dataset.info.shape
        self.evaluator = Evaluator(dataset, config.evaluation, config.seed)
        self.classes = Partition(dataset, config).classes
        self.generator, self.discriminator = build_networks(config, self.shape, len(self.classes))
        layout: dict[str, Any] = {"device": self.device, "memory_format": torch.channels_last}
        for network in (self.generator, self.discriminator):
            network.to(**layout).requires_grad_(False).eval()

    def __repr__(self) -> str:
        return f"cl_ray.Evaluation({self.name})"

    def ready(self) -> None:
        """Answers once it stands."""

    def evaluate(self, job: "EvaluationRequest") -> Evaluation | str:
        """What its weights are worth; a sentence if they cannot be measured."""
        both = self.generator, self.discriminator
        for network, weights in zip(both, job.networks, strict=True):
            network.load_state_dict(weights)
        run = TrainedModel(
            config=self.config,
            shape=self.shape,
            checkpoint=job.checkpoint,
            step=job.step,
            generator=self.generator,
            discriminator=self.discriminator,
            device=self.device,
            classes=tuple(self.classes),
            prior=job.prior,
        )
        try:
            return self.evaluator.evaluate(run)
        except UserError as error:
            return str(error)


@dataclass(frozen=True)
class EvaluationRequest:
    """An evaluation.

    Args:
        epoch: Epochs finished.
        step: Steps taken.
        checkpoint: The checkpoint that holds the networks.
        networks: Their weights.
        prior: What samples are drawn from; None is the noise of training.
    """

    epoch: int
    step: int
    checkpoint: str
    networks: Networks
    prior: Prior | None


class AsyncEvaluator:
    """Rank 0's evaluations, one at a time.

    Args:
        config: The run's.
        dataset: What it trains on.
        name: The run's.
        device: What an evaluation in between computes on.
        say: Tells the user where evaluations are done.
        beside: Whether they may be done beside the training, where a CPU is free.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        name: str,
        device: torch.device,
        say: Callable[[str], Any],
        beside: bool = True,
    ):
        self.config, self.dataset, self.name = config, dataset, name
        self.device, self.say = device, say
        self.results: list[tuple[EvaluationRequest, Evaluation | str]] = []
        self.under_way: tuple[EvaluationRequest, ray.ObjectRef] | None = None
        self.here: NetworkEvaluator | None = None
        self.actor: ray.actor.ActorHandle[Any] | None = None
        least, most = config.worker_range  # an elastic run's workers may want the CPU themselves
        cpus = min(EVALUATION_CPUS, int(ray.available_resources().get("CPU", 0)))
        self.beside = beside
        if beside and config.evaluation.every and least == most and cpus:
            kind = ray.remote(num_cpus=cpus)(NetworkEvaluator)
            self.actor = kind.remote(config, dataset, name, threads=cpus)
            self.ready = self.actor.ready.remote()

    def due(self, epoch: int) -> bool:
        """Whether the networks are evaluated after that many epochs."""
        every = self.config.evaluation.every
        return bool(every) and (epoch % every == 0 or epoch == self.config.epochs)

    def start(self, job: EvaluationRequest) -> None:
        """Begin an evaluation beside the training, or do it now where no CPU is free.

        One that is due while another goes on is left out, unless it is the run's last.
        """
        if self.under_way and job.epoch < self.config.epochs:
            before = self.under_way[0].epoch
            left_out = f"epoch {job.epoch} is not evaluated: that of epoch {before} still goes on"
            self.results.append((job, left_out))
            return
        self._collect(wait=True)
        self._settle()
        if self.actor:
            answer = self.actor.evaluate.remote(job)
            self.under_way = job, answer
        else:
            self._do_here(job)

    def finished(self, wait: bool = False) -> list[tuple[EvaluationRequest, Evaluation | str]]:
        """What was found since the last call; a sentence in place of what could not be."""
        self._collect(wait)
        found, self.results = self.results, []
        return found

    def _settle(self) -> None:
        """See whether the actor stands by now; without it, this process does its work."""
        if self.actor and not ray.wait([self.ready], timeout=PATIENCE)[0]:
            ray.kill(self.actor)
            self.actor = None
        if self.beside and self.actor is None and self.here is None:
            self.say("evaluations interrupt the training: no CPU is free beside the workers'")

    def _collect(self, wait: bool) -> None:
        if self.under_way is None:
            return
        job, answer = self.under_way
        if not ray.wait([answer], timeout=None if wait else 0)[0]:
            return
        self.under_way = None
        try:
            self.results.append((job, ray.get(answer)))
        except ray.exceptions.RayError:  # the actor died, of too little memory or with its node
            self.actor = None
            self._do_here(job)

    def _do_here(self, job: EvaluationRequest) -> None:
        if self.here is None:
            self.here = NetworkEvaluator(self.config, self.dataset, self.name, device=self.device)
        found = self.here.evaluate(job)
        self.results.append((job, found))


def network_weights(gan: ContrastiveGAN) -> Networks:
    """The EMA generator's and D's weights, copied to the CPU."""
    networks = gan.ema_generator, gan.discriminator
    ema_generator, discriminator = (
        {name: weight.detach().float().cpu().clone() for name, weight in n.state_dict().items()}
        for n in networks
    )
    return ema_generator, discriminator
