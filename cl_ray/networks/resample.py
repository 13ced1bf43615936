"""Changes of resolution as two matrix products, along columns and along rows.

Matrix products are fast and deterministic on every device. A depthwise convolution's backward pass
in bfloat16 takes twenty times as long on a CPU, and that of an interpolation is not deterministic
on a GPU.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Resample(nn.Module):
    """Resample [B, C, s, s] to [B, C, t, t].

    Args:
        matrix: Linear map of a line of s pixels to t pixels, [t, s].
    """

    matrix: Tensor

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("matrix", matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Resample along columns, then along rows; input and output are channels-last."""
        matrix, channels, side = self.matrix.to(x.dtype), x.shape[1], x.shape[3]
        columns = matrix @ x.permute(0, 2, 3, 1).flatten(2)
        return (matrix @ columns.unflatten(2, (side, channels))).permute(0, 3, 1, 2)


def downsample(side: int) -> Resample:
    """Halve the side, rounded down, by the binomial filter 1 3 3 1 with replicated edges."""
    matrix = torch.zeros(side // 2, side, dtype=torch.float64)
    for row in range(side // 2):
        for column, weight in enumerate((1, 3, 3, 1), start=2 * row - 1):
            matrix[row, min(max(column, 0), side - 1)] += weight / 8
    return Resample(matrix)


def upsample(side: int, target: int) -> nn.Module:
    """Enlarge the side to `target`, bilinearly; to twice the side this is the filter 1 3 3 1."""
    if side == target:
        return nn.Identity()
    impulses = torch.eye(side, dtype=torch.float64)[None]
    return Resample(functional.interpolate(impulses, target, mode="linear")[0].T.contiguous())
