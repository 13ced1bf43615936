"""Muon: momentum whose matrices are orthogonalized, so that each update moves all directions."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cl_ray.adam import EagerOptimizer

ITERATIONS, COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)
"""Of the Newton-Schulz iteration; singular values end within 0.68 and 1.21."""
BLOCK_SIDE = 128
"""Largest shorter side of a matrix that is orthogonalized as a whole."""
EPSILON = 1e-8
"""As Adam's: a gradient of rounding errors makes no step."""


class Muon(EagerOptimizer):
    """Muon (Jordan et al., 2024) with Nesterov momentum and decoupled weight decay.

    It differs from `torch.optim.Muon`: kernels of convolutions count as matrices; the iteration
    runs on Gram matrices in the type of the weights, those of one size at once, which is faster for
    wide matrices, on CPUs and for small networks; a CUDA graph can capture it; and an update's root
    mean square is about `lr`, as Adam's is, so that the same rates serve both.

    Args:
        params: Weights [out, ...], whose rows are flattened.
        lr: Learning rate; a tensor if `step` is captured in a CUDA graph.
        momentum: Decay rate of the momentum, 0 to 1.
        weight_decay: Fraction of the weights that a step subtracts, over `lr`. Without it weights
            grow with the square root of the steps, which slows learning down (Liu et al., 2025,
            section 2.2).
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float | Tensor,
        momentum: float,
        weight_decay: float = 0.0,
    ):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one step down the gradients."""
        assert closure is None
        for group in self.param_groups:
            lr, beta, params = group["lr"], group["momentum"], group["params"]
            for param in params:
                if not self.state[param]:
                    self.state[param]["momentum"] = torch.zeros_like(param)
            momenta = [self.state[param]["momentum"] for param in params]
            gradients = [param.grad for param in params]
            torch._foreach_lerp_(momenta, gradients, 1 - beta)
            if group["weight_decay"]:
                torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
            means = torch._foreach_lerp(gradients, momenta, beta)
            updates = orthogonalize([mean.flatten(1) for mean in means])
            for param, update in zip(params, updates, strict=True):
                scale = math.sqrt(max(update.shape))
                param.sub_(lr * scale * update.view_as(param))


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Set the singular values of matrices [m, n] to about 1; zeros stay.

    Newton-Schulz iteration X <- a X + b (X X^T) X + c (X X^T)^2 X (Jordan et al., 2024). All its
    polynomials are functions of the Gram matrix X X^T, and commute: it is iterated alone, together
    with those of its size, and X is multiplied once. Of a matrix whose shorter side exceeds
    BLOCK_SIDE, blocks are orthogonalized (Khaled et al., 2025): time grows with the cube of a side.
    """
    blocks = []
    for matrix in matrices:
        x = matrix if len(matrix) <= matrix.shape[1] else matrix.T
        chunks = x.chunk(math.ceil(len(x) / BLOCK_SIDE))
        blocks.append([chunk / (chunk.norm() + EPSILON) for chunk in chunks])
    factors = iter(_factors([block @ block.T for parts in blocks for block in parts]))
    results = []
    for matrix, parts in zip(matrices, blocks, strict=True):
        rows = [next(factors) @ block for block in parts]
        x = torch.cat(rows) if len(rows) > 1 else rows[0]
        results.append(x if x.shape == matrix.shape else x.T)
    return results


def _factors(grams: list[Tensor]) -> list[Tensor]:
    """Return the matrices that orthogonalize those of the Gram matrices, computed size by size."""
    same_size = defaultdict[int, list[int]](list)
    for k, gram in enumerate(grams):
        same_size[len(gram)].append(k)
    factors = grams.copy()
    for chosen in same_size.values():
        gram = torch.stack([grams[k] for k in chosen])
        polynomial = product = _polynomial(gram)
        for _ in range(ITERATIONS - 1):
            gram = polynomial @ gram @ polynomial
            polynomial = _polynomial(gram)
            product = polynomial @ product
        for k, factor in zip(chosen, product, strict=True):
            factors[k] = factor
    return factors


def _polynomial(gram: Tensor) -> Tensor:
    """Return a I + b G + c G^2 of Gram matrices G [k, m, m]."""
    a, b, c = COEFFICIENTS
    polynomial = torch.baddbmm(b * gram, gram, gram, alpha=c)
    polynomial.diagonal(dim1=1, dim2=2).add_(a)
    return polynomial
