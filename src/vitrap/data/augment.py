"""Random crops, flips and jitter of a batch: each image its own, drawn and done on the batch's device.

The draw comes from a generator on any device. No loop over images, and the host never waits for the device.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

TILT, SCALE, SHEAR = math.radians(15), 0.15, 0.15
"""Jitter of strength 1 turns by up to so many radians, resizes by so much, and leans sideways by so much a row."""
COLOUR = 0.4
"""Jitter of strength 1 changes brightness, contrast and saturation by up to so much."""
LUMA = (0.2989, 0.587, 0.114)
"""Grey of red, green and blue, as torchvision weighs them (ITU-R BT.601)."""


def random_crop(images: Float[Tensor, "b c h w"], padding: int, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Shift each image by up to `padding` pixels either way in both directions, as crops of the padded image.

    The border is zero (black), as in the usual recipes. Reflection would be wrong here: it would show a
    trigger in a corner twice, mirrored, which no attack asks for.

    Args:
        images: any range; not changed.
        padding: greatest shift in pixels; 0 for none.
        generator: the random stream.
    """
    if padding == 0:
        return images
    b, _, h, w = images.shape
    padded = functional.pad(images, (padding,) * 4)
    drawn = torch.randint(2 * padding + 1, (2, b), generator=generator, device=generator.device)
    top, left = drawn.to(images.device, non_blocking=True)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view: b c, place of the crop, h w
    return windows[torch.arange(b, device=images.device), :, top, left]


def random_flip(images: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Mirror each image left to right with probability one half; the argument is not changed."""
    drawn = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    mirrored = drawn.to(images.device, non_blocking=True)[:, None, None, None]
    return torch.where(mirrored, images.flip(-1), images)


def random_jitter(
    images: Float[Tensor, "b 3 h w"], strength: float, generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Change the colours of each image a little, then turn, resize and lean it about its middle.

    Factors of brightness, contrast and saturation are drawn from 1 +- 0.4 `strength`, applied in that order; then one
    bilinear resampling turns by up to 15 degrees, resizes by 1 +- 0.15 and shears by up to 0.15, each times `strength`.
    What comes from outside the image is zero (black), as in `random_crop`. How much and in what order is assumed.

    Args:
        images: in [0, 1]; not changed.
        strength: in [0, 1]; 0 for none.
        generator: the random stream.

    Returns:
        Images in [0, 1].
    """
    if strength == 0:
        return images
    drawn = torch.rand((6, len(images)), generator=generator, device=generator.device)
    tilt, scale, shear, *colours = (2 * strength * drawn.to(images.device, non_blocking=True) - strength).unbind()
    coloured = _recolour(images, *(1 + COLOUR * part[:, None, None, None] for part in colours))
    grid = functional.affine_grid(
        _sources(TILT * tilt, 1 + SCALE * scale, SHEAR * shear, images.shape[-2] / images.shape[-1]),
        list(images.shape),
        align_corners=False,
    )
    return functional.grid_sample(coloured, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _recolour(
    images: Float[Tensor, "b 3 h w"],
    brightness: Float[Tensor, "b 1 1 1"],
    contrast: Float[Tensor, "b 1 1 1"],
    saturation: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, "b 3 h w"]:
    """Towards black, towards the mean grey, towards each pixel's grey, or away from it; [0, 1] after each."""
    bright = (images * brightness).clamp(0, 1)
    contrasted = torch.lerp(_grey(bright).mean((2, 3), keepdim=True), bright, contrast).clamp(0, 1)
    return torch.lerp(_grey(contrasted), contrasted, saturation).clamp(0, 1)


def _grey(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    red, green, blue = (weight * part for weight, part in zip(LUMA, images.split(1, 1), strict=True))
    return red + green + blue


def _sources(
    tilt: Float[Tensor, " b"], scale: Float[Tensor, " b"], shear: Float[Tensor, " b"], tall: float
) -> Float[Tensor, "b 2 3"]:
    """Where each pixel comes from, in `affine_grid`'s coordinates: the inverse of scale, rotation and shear.

    Args:
        tilt: radians.
        scale: 1 leaves the size.
        shear: pixels sideways a row.
        tall: height over width: the coordinates run from -1 to 1 along both.
    """
    cos, sin = tilt.cos() / scale, tilt.sin() / scale
    across = torch.stack([cos - sin * shear, (sin + cos * shear) * tall, torch.zeros_like(tilt)], 1)
    down = torch.stack([-sin / tall, cos, torch.zeros_like(tilt)], 1)
    return torch.stack([across, down], 1)
