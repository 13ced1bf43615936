"""The class loss of images with and without labels."""

import math

import pytest
import torch

from cl_ray.batch import DiscriminatorOutput, DiscriminatorPass, FakeParts, PairBatch, RealParts
from cl_ray.data.dataset import UNLABELLED
from cl_ray.losses.classification import class_losses, consistency
from cl_ray.losses.config import LossConfig


def outputs_of(logits: torch.Tensor) -> list[DiscriminatorOutput]:
    unused = torch.zeros(logits.shape[1], dtype=logits.dtype)
    return [DiscriminatorOutput(unused, unused, part) for part in logits]


@pytest.mark.parametrize("known_rows", [[], [1], [0, 2, 3], [0, 1, 2, 3, 4]])
@pytest.mark.parametrize("views", [0, 2])
def test_only_labelled_images_count(known_rows: list[int], views: int) -> None:
    """The mean over pairs is that over labelled images; padding and fakes have no part in it."""
    random = torch.Generator().manual_seed(len(known_rows))
    logits = torch.randn(7, 6, 3, generator=random, dtype=torch.float64)
    x1, x2, f1, f2, fz, *v = outputs_of(logits)
    present = torch.tensor([[True] * 5 + [False]])
    labels = torch.randint(0, 3, (6, 2), generator=random)
    known = torch.zeros(6, 2, dtype=torch.bool)
    known[known_rows, 0] = True
    known[4:, 1] = True  # also of an image that is padding
    image = torch.zeros(6, dtype=torch.uint8)
    gathered = {"labelled": known.T[..., None].double()}
    d = DiscriminatorPass(RealParts(x1, x2), FakeParts(f1, f2, fz), tuple(v[:views]), gathered)
    given = labels.where(known, UNLABELLED)
    # Any class may stand where none is known, as D predicts one for G.
    for filled in (labels, (labels + 1) % 3):
        batch = PairBatch(image, image, image, present, given.where(known, filled), known)
        losses = class_losses(d, batch, LossConfig(confidence=0.5))
        expected = []
        for part, column in [(0, 0), (1, 1), *((5 + view, 0) for view in range(views))]:
            for row in range(5):
                if known[row, column]:
                    z = logits[part, row]
                    expected.append(float(z.exp().sum().log() - z[labels[row, column]]))
        mean = float(losses["classification"][:5].mean())
        assert mean == pytest.approx(sum(expected) / len(expected), rel=1e-12)
        assert losses.keys() == {"classification", *(["consistency"] if views else [])}
        if views:
            whole = consistency(x1, v, 0.5)[:5][~known[:5, 0]]
            mean = float(losses["consistency"][:5].mean())
            assert mean == pytest.approx(float(whole.mean()) if len(whole) else 0.0, rel=1e-12)
    assert "consistency" not in class_losses(d, batch, LossConfig(consistency=0))


def test_confident_predictions_teach_the_views() -> None:
    """Image 0 is confident in class 1, image 1 is not; no gradient reaches the images."""
    image = torch.tensor([[0.0, 4.0, 0.0], [0.0, 1.0, 0.0]], requires_grad=True)
    views = torch.tensor([[[1.0, 2.0, 3.0]] * 2, [[0.0, 0.0, 0.0]] * 2], requires_grad=True)
    loss = consistency(outputs_of(image[None])[0], outputs_of(views), confidence=0.95)
    first = math.log(sum(math.exp(z - 2) for z in (1, 2, 3)))
    assert loss.tolist() == pytest.approx([(first + math.log(3)) / 2, 0])
    of_image, of_views = torch.autograd.grad(loss.sum(), [image, views], allow_unused=True)
    assert of_image is None
    assert of_views[:, 0].abs().sum() > 0
    assert of_views[:, 1].abs().sum() == 0
