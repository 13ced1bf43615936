"""What ties a fake to the image that it came from, and what hides it."""

from torch import Tensor
from torch.nn.functional import softplus


def reconstruction(fakes: Tensor, images: Tensor) -> Tensor:
    """Mean absolute difference of each fake to its image.

    Args:
        fakes: G of each image, [n, C, H, W] in [-1, 1].
        images: The images, the same shape.

    Returns:
        [n], in [0, 2].
    """
    return (fakes - images).abs().flatten(1).mean(1)


def pair_margin(anchor: Tensor, right: Tensor, wrong: Tensor, temperature: float) -> Tensor:
    """How much better the right fake fits the anchor than the wrong one does, by cosine.

    Args:
        anchor: Unit embeddings [b, e] of x+.
        right: Of f+ = G(x+).
        wrong: Of f- = G(x-).

    Returns:
        Logits [b] of "the right one came from the anchor".
    """
    return (anchor * (right - wrong)).sum(1) / temperature


def pair_classification(margin: Tensor) -> Tensor:
    """D's loss [b]: -log sigmoid(margin), Bradley and Terry's choice between the two fakes."""
    return softplus(-margin)


def pair_confusion(margin: Tensor) -> Tensor:
    """G's loss [b]: D's advantage over guessing, least where D cannot tell f+ from f-.

    The cross-entropy of a coin toss under D's choice, (softplus(m) + softplus(-m)) / 2, which is
    least, log 2, at m = 0; its floor is left in: it has no gradient.
    """
    return (softplus(margin) + softplus(-margin)) / 2
