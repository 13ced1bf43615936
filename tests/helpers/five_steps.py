"""Five float64 steps on a batch that is shared out among the ranks, to be compared with one's.

The third batch and the last are short: their absent rows lie unevenly over the ranks, and with
three or four workers one of them has none present.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.config import Config
from cl_ray.gan import ContrastiveGAN, PairBatch
from cl_ray.losses.adversarial import OBJECTIVES

MODES = ["views", "labels"]
STEPS, PAIRS, SHAPE = 5, 12, (28, 28, 1)
CLASSES = ("ant", "bee", "cat")
ABSENT = [3, 8, 9, 10, 11]
"""Rows of the global batch that the short batches lack: of 2 workers' 6 and 6, 1 and 4."""


G = {"depth": 2, "width": 4, "latent": 8}
D = {"depth": 2, "width": 4, "hidden": 16, "embedding": 8}


@dataclass(frozen=True)
class Case:
    """What is compared."""

    objective: str
    mode: str = "views"
    d_steps: int = 1
    penalty: str = ""
    family: str = "convolutional"
    condition: str = "none"
    contrad: bool = False
    """ContraD's form, D seeing all through views, as its paper has it."""

    def __str__(self) -> str:
        named = f"{self.objective}, {self.mode}, {self.d_steps} of D"
        further = [self.penalty, self.family if self.family != "convolutional" else ""]
        further.append(self.condition if self.condition != "none" else "")
        further.append("contrad" if self.contrad else "")
        return ", ".join([named, *filter(None, further)])

    @property
    def config(self) -> Config:
        """Small networks that are otherwise as they come."""
        losses: dict[str, Any] = {"objective": self.objective}
        losses |= {self.penalty: 2.0} if self.penalty else {}
        losses |= {"form": "contrad"} if self.contrad else {}
        return small(
            augment={"shift": 0.2, "erase": 0.1} if self.contrad else {},
            pairs={"mode": self.mode},
            condition=self.condition,
            losses=losses,
            optimizer={"d_steps": self.d_steps},
            generator={"family": self.family, **G},
            discriminator={
                "family": self.family,
                "spectral_norm": self.objective == "least-squares",
                **D,
            },
        )


CASES = [
    *(
        Case(objective, mode, d_steps)
        for objective in ("non-saturating", "pair-critic")
        for mode in MODES
        for d_steps in (1, 2)
    ),
    *(
        Case(objective, penalty="gradient_penalty" if objective == "wasserstein" else "")
        for objective in OBJECTIVES
        if objective not in ("non-saturating", "pair-critic")
    ),
    Case("relativistic", "labels", 2, "r1"),
    Case("relativistic", "labels", 2, "r2"),
    Case("non-saturating", family="residual"),
    Case("relativistic", "labels", 2, "r1", family="style"),
    Case("non-saturating", condition="classifier"),
    Case("least-squares", condition="projection"),  # with spectral norm
    Case("relativistic", "labels", 2, "gradient_penalty", "style", "projection"),
    Case("non-saturating", contrad=True),
    Case("relativistic", "labels", 2, "r1", condition="projection", contrad=True),
]


@dataclass
class Outcome:
    """One rank's end of a case.

    Args:
        weights: Of G, D and the EMA generator, by name.
        terms: Of each step, by name; this rank's share.
    """

    weights: dict[str, Tensor]
    terms: list[dict[str, Tensor]]


def small(**fields: Any) -> Config:
    """A config of small networks for a batch of PAIRS."""
    return Config.model_validate(
        {
            "batch_size": PAIRS,
            "seed": 3,
            "generator": G,
            "discriminator": D,
            **fields,
        }
    )


def global_batch(number: int, mode: str, labelled: bool = False) -> PairBatch:
    """All rows of step `number`; the same pixels in both modes but for the partners."""
    random = torch.Generator().manual_seed(number)
    positive, negative, other = torch.randint(
        0, 256, (3, PAIRS, *SHAPE), generator=random, dtype=torch.uint8
    )
    present = torch.ones(PAIRS, dtype=torch.bool)
    if number in (2, STEPS - 1):
        present[ABSENT] = False
    drawn = torch.randint(0, len(CLASSES), (PAIRS, 2), generator=random)
    partner, labels = positive if mode == "views" else other, drawn if labelled else None
    return PairBatch(positive, partner, negative, present, labels)


def rows_of(batch: PairBatch, rows: slice | Tensor) -> PairBatch:
    """Some rows of a batch."""
    columns = batch.positive, batch.partner, batch.negative, batch.present, batch.labels
    return PairBatch(*(None if column is None else column[rows] for column in columns))


def moved(batch: PairBatch, device: torch.device | str) -> PairBatch:
    """The batch on a device."""
    columns = batch.positive, batch.partner, batch.negative, batch.present, batch.labels
    return PairBatch(*(None if column is None else column.to(device) for column in columns))


def made(
    config: Config, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> ContrastiveGAN:
    """a ContrastiveGAN of that config, with three classes if it uses labels."""
    classes = CLASSES if config.condition != "none" else ()
    return ContrastiveGAN(config, SHAPE, device, dtype, classes)


def take(cases: list[Case], device: str = "cpu") -> list[Outcome]:
    """This rank's outcome of each case, computed on that device and brought back from there."""
    rank, workers = distributed.world()
    local = PAIRS // workers
    outcomes = []
    for case in cases:
        gan = made(case.config, device=device)
        labelled = case.condition != "none"
        batches = [global_batch(number, case.mode, labelled) for number in range(STEPS)]
        mine = slice(rank * local, (rank + 1) * local)
        terms = [gan.step(moved(rows_of(batch, mine), device)) for batch in batches]
        terms = [{name: term.cpu() for name, term in step.items()} for step in terms]
        weights = {name: weight.cpu() for name, weight in weights_of(gan).items()}
        outcomes.append(Outcome(weights, terms))
    return outcomes


def weights_of(gan: Any) -> dict[str, Tensor]:
    """A copy of every weight, by the name of its network and its own."""
    networks = ("generator", "discriminator", "ema_generator")
    return {
        f"{network}.{name}": weight.detach().clone()
        for network in networks
        for name, weight in getattr(gan, network).named_parameters()
    }


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Between two sets of weights of the same names; infinite where one is not a number."""
    assert ours.keys() == theirs.keys()
    return max((ours[n] - theirs[n]).abs().nan_to_num(torch.inf).max().item() for n in ours)
