"""Uniformity of a single latent vector; of several in test_gan.py."""

import torch

from cl_ray.losses.uniformity import uniformity


def test_single_vector_has_loss_and_gradient_zero() -> None:
    latents = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = uniformity(latents, torch.tensor([True, False, False]))
    (gradient,) = torch.autograd.grad(loss[0], latents)
    assert loss[0] == 0
    assert (gradient == 0).all()
