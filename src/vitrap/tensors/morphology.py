"""Grey-scale morphology with flat structuring elements of any shape; borders as in scipy's `mode="nearest"`."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

Shape = Literal["square", "cross", "disc"]
Operation = Literal["erosion", "dilation", "opening", "closing"]


def element(shape: Shape, size: int) -> Bool[Tensor, "k k"]:
    """A structuring element of `size` x `size` pixels; the size is odd.

    The disc contains the pixels whose centre is at most (size - 1) / 2 from the middle.

    >>> element("cross", 3).int().tolist()
    [[0, 1, 0], [1, 1, 1], [0, 1, 0]]

    Raises:
        ValueError: the size is even or less than 1, or the shape is unknown.
    """
    if size < 1 or size % 2 == 0:
        raise ValueError(f"a structuring element's size must be odd and at least 1, not {size}")
    from_middle = torch.arange(size) - size // 2
    down = from_middle[:, None].abs()
    across = from_middle[None, :].abs()
    if shape == "square":
        return torch.ones(size, size, dtype=torch.bool)
    if shape == "cross":
        return (down == 0) | (across == 0)
    if shape == "disc":
        return down**2 + across**2 <= (size // 2) ** 2
    raise ValueError(f"unknown shape {shape!r} of a structuring element; known: square, cross, disc")


def erode(images: Float[Tensor, "b c h w"], element: Bool[Tensor, "k k"]) -> Float[Tensor, "b c h w"]:
    """Grey-scale erosion: each pixel becomes the minimum of the pixels under the element, channel by channel.

    `out(x, y) = min over (s, t) in element of image(x + s, y + t)`; equal to `scipy.ndimage.grey_erosion` with
    `footprint=element, mode="nearest"`.

    >>> erode(torch.tensor([[[[0.2, 0.9, 0.5]]]]), torch.ones(3, 3, dtype=torch.bool)).flatten().tolist()
    [0.20000000298023224, 0.20000000298023224, 0.5]
    """
    height, width = images.shape[-2:]
    reach = element.shape[0] // 2
    padded = functional.pad(images, (reach,) * 4, mode="replicate")
    # A running minimum over the shifted images, one for each pixel of the element.
    out: Tensor | None = None
    for down, across in element.nonzero().tolist():
        shifted = padded[..., down : down + height, across : across + width]
        out = shifted if out is None else torch.minimum(out, shifted)
    if out is None:
        raise ValueError("an empty structuring element has no minimum: it needs at least one pixel")
    return out


def dilate(images: Float[Tensor, "b c h w"], element: Bool[Tensor, "k k"]) -> Float[Tensor, "b c h w"]:
    """Grey-scale dilation: each pixel becomes the maximum of those under the mirrored element, channel by channel.

    `out(x, y) = max over (s, t) in element of image(x - s, y - t)`; equal to `scipy.ndimage.grey_dilation` with
    `footprint=element, mode="nearest"`.

    >>> dilate(torch.tensor([[[[0.0, 0.5, 0.25]]]]), torch.ones(3, 3, dtype=torch.bool)).flatten().tolist()
    [0.5, 0.5, 0.5]
    """
    return -erode(-images, element.flip(0, 1))


def morph(
    images: Float[Tensor, "b c h w"], element: Bool[Tensor, "k k"], operation: Operation, times: int = 1
) -> Float[Tensor, "b c h w"]:
    """Apply an operation; each of its steps is repeated `times` times.

    Opening is all erosions and then all dilations, closing the reverse.

    >>> morph(torch.tensor([[[[0.0, 1.0, 0.0]]]]), torch.ones(3, 3, dtype=torch.bool), "opening").flatten().tolist()
    [0.0, 0.0, 0.0]
    """
    steps = {"erosion": (erode,), "dilation": (dilate,), "opening": (erode, dilate), "closing": (dilate, erode)}
    for step in steps[operation]:
        for _ in range(times):
            images = step(images, element)
    return images
