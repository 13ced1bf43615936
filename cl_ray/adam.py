"""Adam, and the base of all optimizers here: PyTorch's own, without what is for `torch.compile`."""

from inspect import unwrap

import torch


class EagerOptimizer(torch.optim.Optimizer):
    """An optimizer that does not import `torch._dynamo`, which takes two seconds of each process.

    PyTorch (2.14) imports it at the first call of these methods, so that `torch.compile` leaves
    them out. Nothing here is compiled.
    """

    add_param_group = unwrap(torch.optim.Optimizer.add_param_group)
    load_state_dict = unwrap(torch.optim.Optimizer.load_state_dict)
    state_dict = unwrap(torch.optim.Optimizer.state_dict)
    zero_grad = unwrap(torch.optim.Optimizer.zero_grad)


class Adam(EagerOptimizer, torch.optim.Adam):
    """`torch.optim.Adam` as an `EagerOptimizer`; `step` computes the same."""

    step = torch.no_grad()(unwrap(torch.optim.Adam.step))
