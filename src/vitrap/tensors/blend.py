"""Blending two images, and pasting one over another under a mask."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def blend(images: Float[Tensor, "b c h w"], other: Float[Tensor, "#b c h w"], keep: float) -> Float[Tensor, "b c h w"]:
    """`keep * images + (1 - keep) * other`: `keep` is the weight of the original, in [0, 1].

    >>> blend(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), 0.75).item()
    0.25
    """
    return torch.lerp(other.expand_as(images), images, keep)


def paste(
    images: Float[Tensor, "b c h w"], other: Float[Tensor, "#b c h w"], mask: Bool[Tensor, "#b h w"]
) -> Float[Tensor, "b c h w"]:
    """`other` where the mask is set, `images` elsewhere."""
    return torch.where(mask[:, None], other, images)
