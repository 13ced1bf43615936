"""Contrastive losses over the global batch: InfoNCE, and ContraD's loss of fakes."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.batch import DiscriminatorPass, Losses
from cl_ray.losses.config import LossConfig


class GatheredKeys(NamedTuple):
    """The vectors of the global batch, seen from one rank of N.

    Args:
        vectors: Of all ranks, [k N b, d], part by part, differentiable.
        own_index: Positions among them of this rank's queries, part by part, [q b].
        allowed: Bool [q b, k N b]: each query's keys, all but padding and itself.
    """

    vectors: Tensor
    own_index: Tensor
    allowed: Tensor


def gather_keys(parts: Tensor, present: Tensor, queries: int) -> GatheredKeys:
    """Gather vectors [k, b, d] of this rank's b pairs from all ranks; `present` is bool [b].

    The first q = `queries` of the k parts are queries as well.
    """
    rank, workers = distributed.world()
    count, local = parts.shape[:2]
    vectors = distributed.gather(parts.transpose(0, 1)).transpose(0, 1).flatten(0, 1)
    all_present = distributed.gather(present.to(parts.dtype)).bool().repeat(count)
    index = torch.arange(queries * local, device=parts.device)
    own_index = (index // local) * workers * local + rank * local + index % local
    allowed = all_present.expand(len(index), -1).scatter(1, own_index[:, None], False)
    return GatheredKeys(vectors, own_index, allowed)


def view_losses(d: DiscriminatorPass, present: Tensor, config: LossConfig) -> Losses:
    """Compute D's losses on two views of x+: `contrastive` and `fake_supcon`.

    In the form `info-nce`, x- and the fakes are further negatives. In the form `contrad` they are
    not (Jeong and Shin, 2021, section 3): the fakes form a class of their own instead.
    """
    losses: Losses = {}
    if config.contrastive:
        view1, view2 = (view.embedding for view in d.views)
        outputs = [] if config.form == "contrad" else [d.real.negative, *d.fake]
        negatives = [output.embedding for output in outputs]
        losses["contrastive"] = info_nce(view1, view2, negatives, present, config.temperature)
    if config.form == "contrad" and config.fake_supcon:
        embeddings = [output.fake_embedding for output in (*d.views, *d.fake)]
        view1, view2, *fakes = [e for e in embeddings if e is not None]
        losses["fake_supcon"] = fake_supcon(fakes, view1, view2, present, config.temperature)
    return losses


def info_nce(
    view1: Tensor, view2: Tensor, negatives: Sequence[Tensor], present: Tensor, temperature: float
) -> Tensor:
    """Compute InfoNCE: attract the two views of an image, repel everything else.

    InfoNCE (van den Oord et al., 2018, equation 4) in the two-view form of SimCLR (Chen et al.,
    2020, equation 1), with further negatives. The keys of a query are the views of all ranks
    except the query, and the `negatives` of all ranks; its positive is its other view.

    Args:
        view1: Unit embeddings [b, e] of one view of this rank's images.
        view2: The same of another view.
        negatives: Unit embeddings [b, e] each of images that match no query.
        present: Bool [b], false for padding; a padded row is no key.
        temperature: Divides the cosine similarities.

    Returns:
        [b], the mean over each image's two queries; undefined for padding.
    """
    local = len(present)
    keys = gather_keys(torch.stack([view1, view2, *negatives]), present, queries=2)
    similarity = widen(torch.cat([view1, view2]) @ keys.vectors.T / temperature)
    positive = keys.own_index.roll(local)  # position of the other view
    # A padded row keeps its own positive: its loss is finite, and its weight is 0.
    allowed = keys.allowed.scatter(1, positive[:, None], True)
    logits = similarity.masked_fill(~allowed, float("-inf"))
    loss = torch.nn.functional.cross_entropy(logits, positive, reduction="none")
    return loss.view(2, local).mean(0)


def fake_supcon(
    fakes: Sequence[Tensor], view1: Tensor, view2: Tensor, present: Tensor, temperature: float
) -> Tensor:
    """Compute ContraD's loss of fakes: attract all fakes, repel views of real images.

    ContraD (Jeong and Shin, 2021, section 3): supervised contrastive loss (Khosla et al., 2020,
    equation 2) in which the fakes are one class. Only fakes are queries.

    Args:
        fakes: k unit embeddings [b, e], of k fakes of each of this rank's pairs.
        view1: Unit embeddings [b, e] of one view of the real images.
        view2: Unit embeddings [b, e] of another view.
        present: Bool [b], false for padding; a padded row is no key.
        temperature: Divides the cosine similarities.

    Returns:
        [b], the mean over each pair's k fakes; 0 without another fake; undefined for padding.
    """
    count, local = len(fakes), len(present)
    keys = gather_keys(torch.stack([*fakes, view1, view2]), present, queries=count)
    similarity = widen(torch.cat(list(fakes)) @ keys.vectors.T / temperature)
    index = torch.arange(len(keys.vectors), device=present.device)
    positive = keys.allowed & (index < len(index) // (count + 2) * count)
    partition = similarity.masked_fill(~keys.allowed, float("-inf"))
    log_partition = partition.logsumexp(1, keepdim=True)
    log_likelihood = similarity - log_partition
    positives = positive.sum(1)
    loss = -log_likelihood.masked_fill(~positive, 0).sum(1) / positives.clamp(min=1)
    return loss.masked_fill(positives == 0, 0).view(count, local).mean(0)


def widen(similarity: Tensor) -> Tensor:
    """Widen the bfloat16 product of an autocast region to float32."""
    return similarity.float() if similarity.dtype == torch.bfloat16 else similarity
