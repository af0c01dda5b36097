"""Images in [0, 1] and their 8-bit pixels, from one to the other; noise that depends on the image alone."""

from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor


def to_bytes(images: Float[Tensor, "b c h w"]) -> UInt8[Tensor, "b c h w"]:
    """Round images in [0, 1] to 8 bits.

    >>> to_bytes(torch.tensor([0.0, 0.5, 1.0, 1.2]).reshape(1, 1, 2, 2)).flatten().tolist()
    [0, 128, 255, 255]
    """
    return images.clamp(0, 1).mul_(255).round_().to(torch.uint8)


def to_unit(pixels: UInt8[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """8-bit pixels as floats in [0, 1]."""
    return pixels.float() / 255


def round8(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Round images in [0, 1] to the values that 8 bits can store."""
    return to_unit(to_bytes(images))


def straight_round8(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """`round8` with the straight-through estimator: gradients pass as if there were no rounding.

    Bengio, Leonard, Courville: "Estimating or Propagating Gradients Through Stochastic Neurons for Conditional
    Computation", 2013, https://arxiv.org/abs/1308.3432.
    """
    return _StraightRound8.apply(images)  # pyright: ignore[reportReturnType]


class _StraightRound8(torch.autograd.Function):
    """Rounds forwards, and does nothing backwards."""

    @staticmethod
    def forward(ctx: Any, images: Tensor) -> Tensor:
        return round8(images)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def image_hash(images: Float[Tensor, "b c h w"]) -> Int64[Tensor, " b"]:
    """A hash in [0, 2**31) of each image's 8-bit pixels: their sum with scrambled weights."""
    prime = 2**31 - 1
    pixels = to_bytes(images).flatten(1).long() + 1
    places = torch.arange(1, pixels.shape[1] + 1, device=images.device)
    # Each product is below 2**40, so one remainder at the end is the same as one for each pixel, and faster.
    return (pixels * _mix(places)).sum(1) % prime


def hashed_noise(images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """Uniform noise in [0, 1) for each pixel, seeded by the image: it gets the same noise in every batch."""
    height, width = images.shape[-2:]
    places = torch.arange(height * width, device=images.device)
    mixed = _mix(image_hash(images)[:, None] + _mix(places)[None, :])
    return (mixed.float() / 2**31).clamp(max=1 - 1e-7).view(-1, height, width)


def _mix(x: Int64[Tensor, "*n"]) -> Int64[Tensor, "*n"]:
    """Scramble integers to [0, 2**31): two rounds of multiply and xor-shift, as in common integer hashes."""
    mask = 2**31 - 1
    for factor in (0x45D9F3B, 0x119DE1F3):
        x = ((x ^ (x >> 16)) * factor) & mask
    return x ^ (x >> 16)
