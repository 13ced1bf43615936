"""Five float64 steps of every configuration, by one rank or several, to be compared.

The third batch and the last are short: their absent rows lie unevenly over the ranks, and of
three workers one has no present row.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.batch import Losses, PairBatch
from cl_ray.config import Config
from cl_ray.data.config import PHOTO_VIEWS
from cl_ray.data.dataset import UNLABELLED
from cl_ray.gan import ContrastiveGAN
from cl_ray.losses.adversarial import OBJECTIVES
from cl_ray.losses.config import UNBOUNDED

MODES = ["views", "labels"]
STEPS, PAIRS, SHAPE = 5, 12, (28, 28, 1)
CLASSES = ("ant", "bee", "cat")
ABSENT = [3, 8, 9, 10, 11]
"""Rows that the short batches lack: of 2 workers' 6 and 6, 1 and 4."""
LABELLED = 4
"""Labelled x+ of a batch that has unlabelled images; all are of the first of 2 workers."""
G = {"depth": 2, "width": 4, "latent": 8}
D = {"depth": 2, "width": 4, "hidden": 16, "embedding": 8}


@dataclass(frozen=True)
class Case:
    """A configuration; `contrad` is ContraD's form with augmentation, and views of photographs."""

    objective: str
    mode: str = "views"
    d_steps: int = 1
    penalty: str = ""
    family: str = "convolutional"
    condition: str = "none"
    contrad: bool = False
    unlabelled: bool = False

    def __str__(self) -> str:
        named = [self.objective, self.mode, f"{self.d_steps} of D", self.penalty]
        named.append(self.family if self.family != "convolutional" else "")
        named.append(self.condition if self.condition != "none" else "")
        named += ["contrad"] * self.contrad + ["unlabelled"] * self.unlabelled
        return ", ".join(filter(None, named))

    @property
    def config(self) -> Config:
        """Small networks; all else by default."""
        losses: dict[str, Any] = {"objective": self.objective}
        losses |= {self.penalty: 2.0} if self.penalty else {}
        losses |= {"form": "contrad"} if self.contrad else {}
        losses |= {"confidence": 0.4} if self.unlabelled else {}
        spectral_norm = self.objective == "least-squares"
        return small_config(
            augment={"shift": 0.2, "erase": 0.1, "flip": 0.5, "blur": 0.05} if self.contrad else {},
            views=PHOTO_VIEWS if self.contrad else {},
            pairs={"mode": self.mode},
            condition=self.condition,
            losses=losses,
            optimizer={"d_steps": self.d_steps},
            generator={"family": self.family, **G},
            discriminator={"family": self.family, "spectral_norm": spectral_norm, **D},
        )


CASES = [
    *(
        Case(objective, mode, d_steps)
        for objective in ("non-saturating", "pair-critic")
        for mode in MODES
        for d_steps in (1, 2)
    ),
    *(
        Case(objective, penalty="gradient_penalty" if objective in UNBOUNDED else "")
        for objective in OBJECTIVES
        if objective not in ("non-saturating", "pair-critic")
    ),
    Case("relativistic", "labels", 2, "r1"),
    Case("relativistic", "labels", 2, "r2"),
    Case("non-saturating", family="residual"),
    Case("relativistic", "labels", 2, "r1", family="style"),
    Case("non-saturating", condition="classifier"),
    Case("non-saturating", condition="classifier", unlabelled=True),
    Case("hinge", "labels", 2, condition="classifier", contrad=True, unlabelled=True),
    Case("least-squares", condition="classifier", unlabelled=True),  # with spectral norm
    Case("least-squares", condition="projection"),  # with spectral norm
    Case("relativistic", "labels", 2, "gradient_penalty", "style", "projection"),
    Case("non-saturating", contrad=True),
    Case("relativistic", "labels", 2, "r1", condition="projection", contrad=True),
]


@dataclass
class Outcome:
    """One rank's result of a case.

    Args:
        weights: Of G, D and the EMA generator, by name.
        metrics: Of each step; this rank's part.
    """

    weights: dict[str, Tensor]
    metrics: list[Losses]


def small_config(**fields: Any) -> Config:
    """Return a config of small networks for a batch of PAIRS, with the penalty `approximate_r1`."""
    fields = {"batch_size": PAIRS, "seed": 3, "generator": G, "discriminator": D, **fields}
    losses = {"objective": "non-saturating", "approximate_r1": 0.05, "gradient_penalty": 0.0}
    fields["losses"] = losses | fields.get("losses", {})
    return Config.model_validate(fields)


def global_batch(
    number: int, mode: str, labelled: bool = False, unlabelled: bool = False
) -> PairBatch:
    """Return all rows of step `number`; the modes differ in the partners only.

    If some are `unlabelled`, most images of the first rows have labels, and no others.
    """
    random = torch.Generator().manual_seed(number)
    positive, negative, other = torch.randint(
        0, 256, (3, PAIRS, *SHAPE), generator=random, dtype=torch.uint8
    )
    present = torch.ones(1, PAIRS, dtype=torch.bool)
    if number in (2, STEPS - 1):
        present[0, ABSENT] = False
    labels = torch.randint(0, len(CLASSES), (PAIRS, 2), generator=random) if labelled else None
    partner = positive if mode == "views" else other
    batch = PairBatch(positive, partner, negative, present, labels)
    if labels is None or not unlabelled:
        return batch
    known = torch.zeros(PAIRS, 2, dtype=torch.bool)
    known[:LABELLED, 0] = known[1 : LABELLED + 1, 1] = True
    return batch._replace(labels=labels.where(known, UNLABELLED), labelled=known)


def move_batch(
    batch: PairBatch, device: torch.device | str, rows: slice = slice(None)
) -> PairBatch:
    """Return rows of a global batch on a device, of the rank that has them."""

    def move(field: Tensor) -> Tensor:
        return field[rows].to(device)

    return PairBatch(
        move(batch.positive),
        move(batch.partner),
        move(batch.negative),
        batch.present.view(-1, len(batch.positive[rows])).to(device),
        None if batch.labels is None else move(batch.labels),
        None if batch.labelled is None else move(batch.labelled),
    )


def build_gan(
    config: Config, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu"
) -> ContrastiveGAN:
    """Build a ContrastiveGAN, with three classes if the config uses labels."""
    classes = CLASSES if config.condition != "none" else ()
    return ContrastiveGAN(config, SHAPE, device, dtype, classes)


def take_five_steps(cases: list[Case], device: str = "cpu") -> list[Outcome]:
    """Train on this rank's rows for each case."""
    rank, workers = distributed.world()
    rows = slice(rank * PAIRS // workers, (rank + 1) * PAIRS // workers)
    outcomes = []
    for case in cases:
        gan, metrics = build_gan(case.config, device=device), []
        for number in range(STEPS):
            batch = global_batch(number, case.mode, case.condition != "none", case.unlabelled)
            step = gan.train_step(move_batch(batch, device, rows))
            metrics.append({name: value.cpu() for name, value in step.items()})
        weights = {name: weight.cpu() for name, weight in weights_of(gan).items()}
        outcomes.append(Outcome(weights, metrics))
    return outcomes


def weights_of(gan: Any) -> dict[str, Tensor]:
    """Copy every weight, by the name of its network and its own."""
    return {
        f"{network}.{name}": weight.detach().clone()
        for network in ("generator", "discriminator", "ema_generator")
        for name, weight in getattr(gan, network).named_parameters()
    }


def largest_difference(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Return the largest difference of two sets of weights; infinite at NaN."""
    assert ours.keys() == theirs.keys()
    return max((ours[n] - theirs[n]).abs().nan_to_num(torch.inf).max().item() for n in ours)
