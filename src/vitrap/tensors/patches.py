"""Maps over tokens and over pixels: going from one to the other, and selecting pixels by their score."""

from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

Upsampling = Literal["bilinear", "nearest"]


def tokens_to_pixels(
    tokens: Float[Tensor, "b gh gw"], size: tuple[int, int], mode: Upsampling
) -> Float[Tensor, "b h w"]:
    """Up-sample a map from the token grid to the pixel grid; "nearest" gives whole patches.

    >>> tokens_to_pixels(torch.tensor([[[1.0, 2.0]]]), (1, 4), "nearest").flatten().tolist()
    [1.0, 1.0, 2.0, 2.0]
    """
    return functional.interpolate(tokens[:, None], size, mode=mode)[:, 0]


def tokens_touched(box: tuple[float, float, float, float], size: int, grid: tuple[int, int]) -> Bool[Tensor, "gh gw"]:
    """The tokens that a box covers at least in part.

    Args:
        box: top, left, bottom and right edge, in pixels, whole or not. A token that only shares an edge with the box is
            not touched.
        size: side of the image, in pixels.
        grid: rows and columns of tokens, which divide the image evenly.

    >>> tokens_touched((1.0, 4.5, 2.0, 8.0), 8, (2, 2)).int().tolist()
    [[0, 1], [0, 0]]
    """
    top, left, bottom, right = box
    # First pixel of each row and column of tokens.
    rows, columns = (torch.arange(n, dtype=torch.float64) * size / n for n in grid)
    hair = 1e-9 * size  # two edges this close are the same edge, up to rounding
    row = (rows < bottom - hair) & (top < rows + size / grid[0] - hair)
    column = (columns < right - hair) & (left < columns + size / grid[1] - hair)
    return row[:, None] & column[None, :]


def above_quantile(scores: Float[Tensor, "b h w"], level: float) -> Bool[Tensor, "b h w"]:
    """Select the pixels whose score exceeds the `level` quantile of their image, with `level` in [0, 1).

    Without ties, these are exactly `round((1 - level) * h * w)` pixels. Pixels that tie with the quantile are all left
    out, since the comparison is strict; so whole patches of equal score are left out together.

    >>> above_quantile(torch.tensor([[[1.0, 4.0, 3.0, 2.0]]]), 0.75).int().flatten().tolist()
    [0, 1, 0, 0]
    """
    flat = scores.flatten(1)
    below = flat.shape[1] - round((1 - level) * flat.shape[1])
    if below == 0:
        return torch.ones_like(scores, dtype=torch.bool)
    return scores > flat.kthvalue(below, dim=1).values[:, None, None]


def top_scores_like(mask: Bool[Tensor, "b h w"], scores: Float[Tensor, "b h w"]) -> Bool[Tensor, "b h w"]:
    """Select as many pixels of each image as `mask` selects, but those with the greatest scores.

    >>> scores = torch.tensor([[[0.1, 0.7, 0.2]]])
    >>> top_scores_like(torch.tensor([[[True, False, False]]]), scores).int().flatten().tolist()
    [0, 1, 0]
    """
    rank = scores.flatten(1).argsort(1, descending=True).argsort(1)
    return (rank < mask.sum((1, 2))[:, None]).view_as(mask)


def above_value(scores: Float[Tensor, "b h w"], value: float) -> Bool[Tensor, "b h w"]:
    """Select the pixels whose score exceeds the share `value` of the image's maximum; none where all scores are 0.

    >>> above_value(torch.tensor([[[1.0, 4.0, 3.0, 2.0]]]), 0.5).int().flatten().tolist()
    [0, 1, 1, 0]
    """
    return scores > value * scores.amax((1, 2), keepdim=True)
