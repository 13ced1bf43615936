"""Losses between a fake and the image that it was made from."""

from torch import Tensor
from torch.nn.functional import softplus


def reconstruction(fake: Tensor, image: Tensor) -> Tensor:
    """Compute the mean absolute difference, [b], of fakes [b, C, H, W] to their images."""
    return (fake - image).abs().flatten(1).mean(1)


def pair_margin(anchor: Tensor, right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """Compute by how much the right fake is closer to the anchor than the wrong one, by cosine.

    The embeddings [b, e] of the anchor x+, of G(x+) and of G(x-) are unit vectors; the result are
    logits [b] of "the right fake was made from the anchor".
    """
    return (anchor * (right - wrong)).sum(1) / temperature


def pair_classification(margin: Tensor) -> Tensor:
    """Compute D's loss [b], -log sigmoid(margin): Bradley and Terry's (1952) model of a choice."""
    return softplus(-margin)


def pair_confusion(margin: Tensor) -> Tensor:
    """Compute G's loss [b], the cross-entropy of a fair coin under D's choice.

    (softplus(m) + softplus(-m)) / 2; least, log 2, at m = 0, where D cannot tell the fakes apart.
    """
    return (softplus(margin) + softplus(-margin)) / 2
