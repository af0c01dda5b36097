"""Random crops and flips of a batch: each image its own, drawn and done on the batch's device.

The draw comes from a generator on any device. No loop over images, and the host never waits for the device.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional


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
