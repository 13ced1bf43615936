"""InfoNCE over the global batch."""

import torch
from torch import Tensor

from cl_ray import distributed


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
    rank, workers = distributed.world()
    local = len(present)
    rows = torch.cat([torch.stack([first, second]), others]).transpose(0, 1)  # [b, 2 + k, e]
    keys = distributed.gather(rows).transpose(0, 1)  # [2 + k, N b, e]
    here = distributed.gather(present.to(rows.dtype)).bool()  # [N b]
    absent = ~here.expand(len(keys), -1).reshape(-1)

    similarity = torch.stack([first, second]).flatten(0, 1) @ keys.flatten(0, 1).T / temperature
    query = torch.arange(2 * local, device=rows.device)
    total = workers * local
    itself = (query // local) * total + rank * local + query % local
    positive = (1 - query // local) * total + rank * local + query % local
    similarity = similarity.float() if similarity.dtype == torch.bfloat16 else similarity
    blocked = absent.expand(len(query), -1).clone()
    blocked[query, itself] = True
    blocked[query, positive] = False  # an absent row keeps its own positive: finite, then masked
    loss = torch.nn.functional.cross_entropy(
        similarity.masked_fill(blocked, float("-inf")), positive, reduction="none"
    )
    return loss.view(2, local).mean(0)
