"""The class loss against a softmax written out."""

import math

import pytest
import torch

from cl_ray.batch import DiscriminatorOutput
from cl_ray.losses.classification import auxiliary_classification


@pytest.mark.parametrize(("parts", "pairs", "classes"), [(1, 1, 2), (2, 5, 10), (3, 7, 1000)])
@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_equals_the_softmax_written_out(parts: int, pairs: int, classes: int, scale: float) -> None:
    random = torch.Generator().manual_seed(pairs)
    logits = scale * torch.randn(parts, pairs, classes, generator=random, dtype=torch.float64)
    labels = torch.randint(0, classes, (parts, pairs), generator=random)
    unused = torch.zeros(pairs)
    outputs = [DiscriminatorOutput(unused, unused, part) for part in logits]
    loss = auxiliary_classification(outputs, labels)
    assert loss.shape == (pairs,)
    for pair in range(pairs):
        expected = 0.0
        for part in range(parts):
            row = logits[part, pair].tolist()
            right = row[int(labels[part, pair])]
            expected += math.log(sum(math.exp(other - right) for other in row)) / parts
        assert loss[pair].item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
