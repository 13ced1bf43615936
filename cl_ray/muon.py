"""Muon: momentum whose matrices are orthogonalized, so that each update moves all directions."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration; singular values end within 0.68 and 1.21."""
EPSILON = 1e-8
"""As Adam's: a gradient of rounding errors makes no step."""


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al., 2024) with Nesterov momentum.

    It differs from `torch.optim.Muon`: kernels of convolutions count as matrices; the iteration
    runs on Gram matrices in the type of the weights, which is faster for wide matrices and on
    CPUs; a CUDA graph can capture it; and an update's root mean square is about `lr`, as Adam's is,
    so that the same rates serve both.

    Args:
        params: Weights [out, ...], whose rows are flattened.
        lr: Learning rate; a tensor if `step` is captured in a CUDA graph.
        momentum: Decay rate of the momentum, 0 to 1.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float | Tensor, momentum: float):
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step down the gradients."""
        assert closure is None
        for group in self.param_groups:
            lr, beta = group["lr"], group["momentum"]
            for param in group["params"]:
                state = self.state[param]
                if not state:
                    state["momentum"] = torch.zeros_like(param)
                momentum = state["momentum"].lerp_(param.grad, 1 - beta)
                update = orthogonalize(param.grad.lerp(momentum, beta).flatten(1))
                scale = math.sqrt(max(update.shape))
                param.sub_(lr * scale * update.view_as(param))


def orthogonalize(matrix: Tensor) -> Tensor:
    """Set the singular values of a matrix [m, n] to about 1; zeros stay.

    Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X (Jordan et al., 2024). All its
    polynomials are functions of the Gram matrix X X^T, and commute: it is iterated alone, and X is
    multiplied once.
    """
    if len(matrix) > matrix.shape[1]:
        return orthogonalize(matrix.T).T
    a, b, c = COEFFICIENTS
    x = matrix / (matrix.norm() + EPSILON)
    gram = x @ x.T
    product = torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(ITERATIONS):
        polynomial = torch.addmm(b * gram, gram, gram, alpha=c)
        polynomial.diagonal().add_(a)
        product = polynomial @ product
        gram = polynomial @ gram @ polynomial
    return product @ x
