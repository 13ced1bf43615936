"""Changes of resolution, each by one matrix along columns and along rows.

As matrix products they are fast and repeatable everywhere. A depthwise convolution's backward pass
in bfloat16 takes twenty times as long on a CPU, and that of an interpolation adds up in no fixed
order on a GPU, where a run would not go on as it was.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Resample(nn.Module):
    """[B, C, s, s] to [B, C, t, t].

    Args:
        matrix: What a line of t pixels is made of, [t, s].
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Along columns, then along rows, channels last as convolutions leave and take them."""
        matrix, channels, side = self.matrix.to(x.dtype), x.shape[1], x.shape[3]
        columns = matrix @ x.permute(0, 2, 3, 1).flatten(2)
        return (matrix @ columns.unflatten(2, (side, channels))).permute(0, 3, 1, 2)


def halve(side: int) -> Resample:
    """To half of the side, rounded down, by the binomial filter 1 3 3 1; the edges go on."""
    matrix = torch.zeros(side // 2, side, dtype=torch.float64)
    for row in range(side // 2):
        for place, weight in enumerate((1, 3, 3, 1), start=2 * row - 1):
            matrix[row, min(max(place, 0), side - 1)] += weight / 8
    return Resample(matrix)


def enlarge(side: int, to: int) -> nn.Module:
    """To a side as large or larger, bilinear: to twice the side, the filter 1 3 3 1."""
    if side == to:
        return nn.Identity()
    impulses = torch.eye(side, dtype=torch.float64)[None]
    return Resample(functional.interpolate(impulses, to, mode="linear")[0].T.contiguous())
