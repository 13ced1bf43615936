"""The last layer of every generator."""

import torch
from torch import Tensor, nn

STRETCH = 1.1
"""The slope where a pixel reaches black or white is then 0.19."""


class StretchedTanh(nn.Module):
    """Numbers of any size to pixels in [-1, 1]: tanh, stretched by STRETCH and cut.

    A plain tanh reaches -1 nowhere. Black is where |G(x) - x| is least for a G that knows nothing
    yet, so a black background would draw its inputs towards minus infinity, and with no slope left
    there a G that paints all black never leaves it (benchmarks/README.md). Stretched, -1 is
    reached where there is a slope; cut, no fake is known by pixels that no image has. The gradient
    is that of the stretched tanh, also where it is cut (straight-through estimator: Bengio et al.,
    2013).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pixels of the shape of x."""
        wide = STRETCH * torch.tanh(x)
        return wide.clamp(-1, 1).detach() + (wide - wide.detach())  # the latter is 0, exactly
