"""The optimizer of one network: minimizes weighted losses that are means over the global batch."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from cl_ray import distributed
from cl_ray.adam import Adam
from cl_ray.batch import Losses
from cl_ray.muon import Muon
from cl_ray.train_config import GANConfig


class NetworkOptimizer:
    """Muon for the matrices of one network and Adam for its vectors, or Adam for all.

    Args:
        network: The network; losses may depend on others, which then get no gradient.
        player: `g` or `d`: selects the learning rate, and prefixes the names of losses in metrics.
        config: Options of the optimizers, and the weight of each loss.
        use_cuda_graph: Whether `minimize` is captured in a CUDA graph.
    """

    def __init__(
        self, network: nn.Module, player: Literal["g", "d"], config: GANConfig, use_cuda_graph: bool
    ):
        self.network_params = list(network.parameters())
        self.player, self.weights = player, config.losses.model_dump()
        options, device = config.optimizer, self.network_params[0].device
        self.configured_lr, weight_decay = (
            (options.lr_g, options.weight_decay_g)
            if player == "g"
            else (options.lr_d, options.weight_decay_d)
        )
        lr: float | Tensor = self.configured_lr
        if use_cuda_graph:  # which reads it in place
            lr = torch.tensor(lr, device=device)
        embeddings = {id(m.weight) for m in network.modules() if isinstance(m, nn.Embedding)}
        matrices: list[nn.Parameter] = []
        others: list[nn.Parameter] = []
        for param in self.network_params:
            is_matrix = param.ndim > 1 and id(param) not in embeddings
            (matrices if is_matrix and options.algorithm == "muon" else others).append(param)
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adam": Adam(
                others,
                lr,
                (options.beta1, options.beta2),
                fused=device.type in ("cpu", "cuda"),
                capturable=use_cuda_graph,
            )
        }
        if matrices:
            self.optimizers["muon"] = Muon(matrices, lr, options.beta1, weight_decay)

    def minimize(self, losses: Losses, row_weights: Tensor) -> Losses:
        """Take one step down the weighted sum of the losses.

        Args:
            losses: Loss of each pair of this rank, [b], or of all N ranks, [N b], by name.
            row_weights: Weight of each pair in a mean over the global batch, [N, b].

        Returns:
            This rank's part of each loss's global mean, detached scalars by prefixed name.
        """
        means = weighted_means(losses, row_weights)
        total = torch.stack([self.weights[name] * mean for name, mean in means.items()]).sum()
        gradients = torch.autograd.grad(total, self.network_params, materialize_grads=True)
        summed = distributed.sum_gradients(gradients)
        for parameter, gradient in zip(self.network_params, summed, strict=True):
            # Fused Adam requires a gradient with the memory layout of its parameter.
            parameter.grad = torch.empty_like(parameter).copy_(gradient)
        for optimizer in self.optimizers.values():
            optimizer.step()
        return {f"{self.player}/{name}": mean.detach() for name, mean in means.items()}

    def set_lr_scale(self, scale: float) -> None:
        """Set the learning rate to this fraction of the configured one."""
        self._set_lr(scale * self.configured_lr)

    def _set_lr(self, lr: float) -> None:
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                if isinstance(group["lr"], Tensor):  # a CUDA graph reads it in place
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Return moments and learning rate."""
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load moments and learning rate; the other options stay those of this device."""
        for name, optimizer in self.optimizers.items():
            own = optimizer.state_dict()["param_groups"]
            optimizer.load_state_dict({**state[name], "param_groups": own})
            self._set_lr(float(state[name]["param_groups"][0]["lr"]))


@torch.no_grad()
def update_ema(ema: nn.Module, network: nn.Module, decay: float) -> None:
    """Move the parameters of `ema` towards those of a network, in place."""
    parameters: list[Tensor] = list(network.parameters())
    torch._foreach_lerp_(list(ema.parameters()), parameters, 1 - decay)


def weighted_means(losses: Losses, row_weights: Tensor) -> Losses:
    """Return this rank's part of the mean over the global batch; the parts' sum is the mean.

    Of values [b] it is the sum over the rank's own pairs; of values [N b], which every rank has, it
    is 1/N of the mean (see `distributed.gather`).
    """
    rank, workers = distributed.world()
    own_weights, all_weights = row_weights[rank], row_weights.flatten() / workers
    return {
        name: (value * (own_weights if len(value) == len(own_weights) else all_weights)).sum()
        for name, value in losses.items()
    }


def global_row_weights(present: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight of each row of all N ranks in a mean over the global batch.

    Args:
        present: Bool [N, b]; false rows are padding.
        dtype: Type of the result.

    Returns:
        [N, b]: 1 / (number of present rows), and 0 for padding.

    Raises:
        RuntimeError: N is not the number of processes: a rank whose group was destroyed meanwhile
            must not train on alone.
    """
    workers = distributed.world()[1]
    if len(present) != workers:
        raise RuntimeError(
            f"PairBatch.present is {list(present.shape)}, of {len(present)} workers, but the "
            f"process group has {workers}."
        )
    weights = present.to(dtype)
    return weights / weights.sum()
