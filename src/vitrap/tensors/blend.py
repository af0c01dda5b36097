"""Putting one image over another."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def blend(images: Float[Tensor, "b c h w"], other: Float[Tensor, "#b c h w"], alpha: float) -> Float[Tensor, "b c h w"]:
    """`alpha * images + (1 - alpha) * other`: alpha is the weight of the original.

    >>> blend(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0.75).item()
    0.25
    """
    return torch.lerp(other.expand_as(images), images, alpha)


def paste(
    images: Float[Tensor, "b c h w"], other: Float[Tensor, "#b c h w"], mask: Bool[Tensor, "#b h w"]
) -> Float[Tensor, "b c h w"]:
    """`other` where the mask is set, `images` elsewhere."""
    return torch.where(mask[:, None], other, images)
