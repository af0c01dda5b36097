"""Augmentation of a batch: random crop, flip and jitter, different for each image, on the batch's device.

Random numbers come from a generator on any device. There is no loop over images, and the host never waits for the
device.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

TILT = math.radians(15)
"""The greatest rotation of jitter with strength 1, in radians."""
SCALE = 0.15
"""The greatest change of size of jitter with strength 1."""
SHEAR = 0.15
"""The greatest shear of jitter with strength 1, in pixels sideways per row."""
COLOUR = 0.4
"""The greatest change of brightness, contrast and saturation of jitter with strength 1."""
LUMA = (0.2989, 0.587, 0.114)
"""Weights of red, green and blue in grey, as torchvision has them (ITU-R BT.601)."""


def random_crop(images: Float[Tensor, "b c h w"], padding: int, generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Pad each image by `padding` pixels on all sides and crop it back to its size, at a random place.

    The padding is zero (black), as in common recipes. Reflection would be wrong here: it would show a trigger in a
    corner twice, mirrored, which no attack wants.

    Args:
        images: images of any range; they are not changed.
        padding: the greatest shift, in pixels; 0 for none.
        generator: the random stream.
    """
    if padding == 0:
        return images
    b, _, h, w = images.shape
    padded = functional.pad(images, (padding,) * 4)
    drawn = torch.randint(2 * padding + 1, (2, b), generator=generator, device=generator.device)
    top, left = drawn.to(images.device, non_blocking=True)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # a view: b c, top and left of the crop, h w
    return windows[torch.arange(b, device=images.device), :, top, left]


def random_flip(images: Float[Tensor, "b c h w"], generator: torch.Generator) -> Float[Tensor, "b c h w"]:
    """Mirror each image left to right with probability one half; the images themselves are not changed."""
    drawn = torch.rand(len(images), generator=generator, device=generator.device) < 0.5
    mirrored = drawn.to(images.device, non_blocking=True)[:, None, None, None]
    return torch.where(mirrored, images.flip(-1), images)


def random_jitter(
    images: Float[Tensor, "b 3 h w"], strength: float, generator: torch.Generator
) -> Float[Tensor, "b 3 h w"]:
    """Change the colours of each image a little, then rotate, resize and shear it about its centre.

    Factors of brightness, contrast and saturation are drawn from 1 +- 0.4 `strength` and applied in that order. Then
    one bilinear resampling rotates by up to 15 degrees, resizes by 1 +- 0.15 and shears by up to 0.15, each times
    `strength`. Pixels from outside the image are zero (black), as in `random_crop`. Ranges and order are assumed.

    Args:
        images: images in [0, 1]; they are not changed.
        strength: strength in [0, 1]; 0 for none.
        generator: the random stream.

    Returns:
        Images in [0, 1].
    """
    if strength == 0:
        return images
    drawn = torch.rand((6, len(images)), generator=generator, device=generator.device)
    tilt, scale, shear, *colours = (2 * strength * drawn.to(images.device, non_blocking=True) - strength).unbind()
    coloured = _recolour(images, *(1 + COLOUR * part[:, None, None, None] for part in colours))
    tall = images.shape[-2] / images.shape[-1]
    places = _source_places(TILT * tilt, 1 + SCALE * scale, SHEAR * shear, tall)
    grid = functional.affine_grid(places, list(images.shape), align_corners=False)
    return functional.grid_sample(coloured, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _recolour(
    images: Float[Tensor, "b 3 h w"],
    brightness: Float[Tensor, "b 1 1 1"],
    contrast: Float[Tensor, "b 1 1 1"],
    saturation: Float[Tensor, "b 1 1 1"],
) -> Float[Tensor, "b 3 h w"]:
    """Scale the distance from black, then from the mean grey, then from each pixel's grey; each clipped to [0, 1]."""
    bright = (images * brightness).clamp(0, 1)
    contrasted = torch.lerp(_grey(bright).mean((2, 3), keepdim=True), bright, contrast).clamp(0, 1)
    return torch.lerp(_grey(contrasted), contrasted, saturation).clamp(0, 1)


def _grey(images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 1 h w"]:
    """The luma of each pixel."""
    red, green, blue = images.split(1, 1)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def _source_places(
    tilt: Float[Tensor, " b"], scale: Float[Tensor, " b"], shear: Float[Tensor, " b"], tall: float
) -> Float[Tensor, "b 2 3"]:
    """The affine map from each pixel to the place that it comes from: the inverse of scale, rotation and shear.

    Args:
        tilt: rotation, in radians.
        scale: change of size; 1 for none.
        shear: pixels sideways per row.
        tall: height over width, since `affine_grid`'s coordinates run from -1 to 1 along both.
    """
    cos = tilt.cos() / scale
    sin = tilt.sin() / scale
    across = torch.stack([cos - sin * shear, (sin + cos * shear) * tall, torch.zeros_like(tilt)], 1)
    down = torch.stack([-sin / tall, cos, torch.zeros_like(tilt)], 1)
    return torch.stack([across, down], 1)
