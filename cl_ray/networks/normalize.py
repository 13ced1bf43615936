"""Conversion between stored uint8 images and the networks' range [-1, 1]."""

import torch
from torch import Tensor


def to_unit(images: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Convert uint8 [B, H, W, C] to [-1, 1] [B, C, H, W] with channels-last memory."""
    return images.permute(0, 3, 1, 2).to(dtype).div_(127.5).sub_(1)


def to_uint8(images: Tensor) -> Tensor:
    """Convert [-1, 1] [B, C, H, W] to uint8 [B, H, W, C], rounded; inverse of `to_unit`."""
    return images.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1)
