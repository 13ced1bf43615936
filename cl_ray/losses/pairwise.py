"""Losses between a fake and the image that it was made from."""

from torch import Tensor
from torch.nn.functional import softplus


def reconstruction(fake: Tensor, image: Tensor) -> Tensor:
    """Compute the mean absolute difference of each fake to its image.

    Args:
        fake: G of each image, [b, C, H, W] in [-1, 1].
        image: The images, of the same shape.

    Returns:
        [b], in [0, 2].
    """
    return (fake - image).abs().flatten(1).mean(1)


def pair_margin(anchor: Tensor, right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """Compute by how much the right fake is closer to the anchor than the wrong one, by cosine.

    Args:
        anchor: Unit embeddings [b, e] of x+.
        right: Unit embeddings [b, e] of G(x+).
        wrong: Unit embeddings [b, e] of G(x-).
        temperature: Divides the difference of cosines.

    Returns:
        Logits [b] of "the right fake was made from the anchor".
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
