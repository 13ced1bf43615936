"""The output activation of every generator."""

import torch
from torch import Tensor, nn

STRETCH = 1.1
"""Scale of tanh; its gradient where the output reaches -1 or 1 is 0.19."""


class StretchedTanh(nn.Module):
    """STRETCH * tanh(x), clamped to [-1, 1], with a straight-through gradient.

    A plain tanh reaches -1 only at minus infinity. On images with a black background the
    reconstruction loss of an untrained G is least at black, which drives the inputs there; with a
    vanished gradient G never recovers from all-black images (benchmarks/README.md). The stretched
    tanh reaches -1 with a gradient left. The clamp keeps fakes in the range of real images; its
    backward pass is that of the stretched tanh (straight-through estimator: Bengio et al., 2013).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Compute pixels of the shape of x."""
        stretched = STRETCH * torch.tanh(x)
        return stretched.clamp(-1, 1).detach() + (stretched - stretched.detach())
