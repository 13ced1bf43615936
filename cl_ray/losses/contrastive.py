"""Contrastive losses over the global batch: InfoNCE, and ContraD's loss of fakes."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from cl_ray import distributed
from cl_ray.batch import DiscriminatorPass, Losses
from cl_ray.losses.config import LossConfig


def view_embeddings(d: DiscriminatorPass, config: LossConfig) -> dict[str, Tensor]:
    """Return the embeddings that each of D's losses on views compares, [k, b, e], view by view.

    In the form `info-nce`, x- and the fakes are further negatives of `contrastive`. In the form
    `contrad` they are not (Jeong and Shin, 2021, section 3): the fakes form a class of their own
    instead, in `fake_supcon`.
    """
    vectors: dict[str, Tensor] = {}
    if config.contrastive:
        outputs = d.views if config.form == "contrad" else [*d.views, d.real.negative, *d.fake]
        vectors["contrastive"] = torch.stack([output.embedding for output in outputs])
    if config.form == "contrad" and config.fake_supcon:
        projected = [output.fake_embedding for output in (*d.views, *d.fake)]
        vectors["fake_supcon"] = torch.stack([e for e in projected if e is not None])
    return vectors


def view_losses(vectors: Mapping[str, Tensor], present: Tensor, temperature: float) -> Losses:
    """Compute D's losses on two views of x+ from the `view_embeddings` of the global batch."""
    losses: Losses = {}
    # bfloat16 would round similarities, which a low temperature multiplies.
    with torch.autocast(present.device.type, enabled=False):
        if "contrastive" in vectors:
            view1, view2, *negatives = vectors["contrastive"]
            losses["contrastive"] = info_nce(view1, view2, negatives, present, temperature)
        if "fake_supcon" in vectors:
            view1, view2, *fakes = vectors["fake_supcon"]
            losses["fake_supcon"] = fake_supcon(fakes, view1, view2, present, temperature)
    return losses


def info_nce(
    view1: Tensor, view2: Tensor, negatives: Sequence[Tensor], present: Tensor, temperature: float
) -> Tensor:
    """Compute InfoNCE: attract the two views of an image, repel everything else.

    InfoNCE (van den Oord et al., 2018, equation 4) in the two-view form of SimCLR (Chen et al.,
    2020, equation 1), with further negatives. The keys of a query are all views except the query,
    and the `negatives`; its positive is its other view.

    Args:
        view1: Unit embeddings [n, e] of one view of each image of the global batch.
        view2: The same of another view.
        negatives: Unit embeddings [n, e] each of images that match no query.
        present: Bool, n in any shape, false for padding; a padded row is no key.
        temperature: Divides the cosine similarities.

    Returns:
        [m], for this rank's `loss_rows`: the mean over each image's two queries; undefined for
        padding.
    """
    vectors, images = torch.stack([view1, view2, *negatives]), len(view1)
    queries, positions = select_queries(vectors, parts=2)
    similarity = queries @ vectors.flatten(0, 1).T / temperature
    positive = (positions + images) % (2 * images)  # of the other view
    allowed = allowed_keys(present, len(vectors), positions)
    # A padded row keeps its own positive: its loss is finite, and its weight is 0.
    allowed = allowed.scatter(1, positive[:, None], True)
    logits = similarity.masked_fill(~allowed, float("-inf"))
    loss = torch.nn.functional.cross_entropy(logits, positive, reduction="none")
    return loss.view(2, -1).mean(0)


def fake_supcon(
    fakes: Sequence[Tensor], view1: Tensor, view2: Tensor, present: Tensor, temperature: float
) -> Tensor:
    """Compute ContraD's loss of fakes: attract all fakes, repel views of real images.

    ContraD (Jeong and Shin, 2021, section 3): supervised contrastive loss (Khosla et al., 2020,
    equation 2) in which the fakes are one class. Only fakes are queries.

    Args:
        fakes: k unit embeddings [n, e], of k fakes of each pair of the global batch.
        view1: Unit embeddings [n, e] of one view of the real images.
        view2: Unit embeddings [n, e] of another view.
        present: Bool, n in any shape, false for padding; a padded row is no key.
        temperature: Divides the cosine similarities.

    Returns:
        [m], for this rank's `loss_rows`: the mean over each pair's k fakes; 0 without another fake;
        undefined for padding.
    """
    vectors, count = torch.stack([*fakes, view1, view2]), len(fakes)
    queries, positions = select_queries(vectors, parts=count)
    similarity = queries @ vectors.flatten(0, 1).T / temperature
    allowed = allowed_keys(present, len(vectors), positions)
    index = torch.arange(similarity.shape[1], device=present.device)
    is_fake = index < count * len(view1)
    positive = allowed & is_fake
    partition = similarity.masked_fill(~allowed, float("-inf"))
    log_partition = partition.logsumexp(1, keepdim=True)
    log_likelihood = similarity - log_partition
    positives = positive.sum(1)
    loss = -log_likelihood.masked_fill(~positive, 0).sum(1) / positives.clamp(min=1)
    return loss.masked_fill(positives == 0, 0).view(count, -1).mean(0)


def select_queries(vectors: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Return the queries of this rank, the first q = `parts` parts of its `loss_rows`.

    Of vectors [k, n, d], k of each pair of the global batch, these are the m = q n queries [m, d]
    (for n of `loss_rows`) and their positions among all vectors, [m], part by part.
    """
    pairs = vectors.shape[1]
    rows = distributed.loss_rows(pairs)
    positions = torch.arange(parts * pairs, device=vectors.device).view(parts, pairs)
    return vectors[:parts, rows].flatten(0, 1), positions[:, rows].flatten()


def allowed_keys(present: Tensor, parts: int, positions: Tensor) -> Tensor:
    """Return which of the keys of k = `parts` vectors of each pair a query is compared with.

    All but padding and itself. `present` is false for padding, of n pairs in any shape; `positions`
    [m] are those of the queries among the keys. The result is bool [m, k n], part by part.
    """
    everyone = present.flatten().repeat(parts)
    return everyone.expand(len(positions), -1).scatter(1, positions[:, None], False)
