"""InfoNCE over the global batch."""

import torch
from torch import Tensor

from cl_ray.losses.gather import gather_negatives


def info_nce(
    first: Tensor, second: Tensor, others: Tensor, present: Tensor, temperature: float
) -> Tensor:
    """Pull the two views of each image together, push everything else away.

    InfoNCE (van den Oord et al., 2018, equation 4) in the two-view form of SimCLR (Chen et al.,
    2020, equation 1), with further negatives. The keys of a query are all views of all ranks but
    the query itself, and all `others` of all ranks; its positive is its other view.

    Args:
        first: Unit embeddings [b, e] of one view of this rank's images.
        second: Unit embeddings [b, e] of another view.
        others: Unit embeddings [k, b, e] that are nobody's positive: negatives, fakes.
        present: Bool [b], false where a row only fills the last batch up; such a row is no key.
        temperature: Divides the cosine similarities.

    Returns:
        Losses [b], the mean of each image's two queries; those of absent rows mean nothing.
    """
    local = len(present)
    keys, here, itself = gather_negatives(
        torch.cat([torch.stack([first, second]), others]), present
    )
    similarity = torch.stack([first, second]).flatten(0, 1) @ keys.T / temperature
    itself = itself[: 2 * local]
    positive = itself.roll(local)  # the other view's place
    similarity = similarity.float() if similarity.dtype == torch.bfloat16 else similarity
    blocked = (~here).expand(len(itself), -1).scatter(1, itself[:, None], True)
    # An absent row keeps its own positive: finite, then masked.
    blocked = blocked.scatter(1, positive[:, None], False)
    loss = torch.nn.functional.cross_entropy(
        similarity.masked_fill(blocked, float("-inf")), positive, reduction="none"
    )
    return loss.view(2, local).mean(0)


def fake_supcon(
    fakes: Tensor, first: Tensor, second: Tensor, present: Tensor, temperature: float
) -> Tensor:
    """Pull all fakes together, push them away from the views of real images.

    ContraD (Jeong and Shin, 2021, section 3): supervised contrastion (Khosla et al., 2020,
    equation 2) in which the fakes are one class, and queries, and every other image is only a key.

    Args:
        fakes: Unit embeddings [k, b, e], k fakes of each of this rank's pairs.
        first: Of one view of its real images, [b, e].
        second: Of another view.
        present: Bool [b], false where a row only fills the last batch up; such a row is no key.
        temperature: Divides the cosine similarities.

    Returns:
        Losses [b], the mean of each pair's k fakes; 0 where there is no other fake, and those of
        absent rows mean nothing.
    """
    count, local = fakes.shape[:2]
    keys, here, itself = gather_negatives(torch.cat([fakes, torch.stack([first, second])]), present)
    itself = itself[: count * local]
    similarity = fakes.flatten(0, 1) @ keys.T / temperature
    similarity = similarity.float() if similarity.dtype == torch.bfloat16 else similarity
    allowed = here.expand(len(itself), -1).scatter(1, itself[:, None], False)
    fake = torch.arange(len(keys), device=keys.device) < len(keys) // (count + 2) * count
    alike = allowed & fake
    likelihood = similarity - similarity.masked_fill(~allowed, float("-inf")).logsumexp(
        1, keepdim=True
    )
    number = alike.sum(1)
    loss = -likelihood.masked_fill(~alike, 0).sum(1) / number.clamp(min=1)
    return loss.masked_fill(number == 0, 0).view(count, local).mean(0)
