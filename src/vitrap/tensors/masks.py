"""Opacity masks of a square box: low everywhere but on one cell."""

import torch
from jaxtyping import Float
from torch import Tensor


def cell_masks(side: int, cell: int, stride: int, low: float, high: float) -> Float[Tensor, "cells side side"]:
    """A mask for each place that the cell can take in the box, row by row.

    Args:
        side: side of the box, in pixels.
        cell: side of the square cell, in pixels, at most `side`.
        stride: pixels from one place to the next: with `cell` the places tile the box, with 1 they overlap.
        low: opacity of the box around the cell, in [0, 1].
        high: opacity of the cell, in [0, 1].

    Raises:
        ValueError: the cell does not fit in the box.

    >>> cell_masks(3, 2, 1, 0.0, 1.0)[1].int().tolist()
    [[0, 1, 1], [0, 1, 1], [0, 0, 0]]
    """
    if not 0 < cell <= side:
        raise ValueError(f"a cell of {cell} px does not fit in a box of {side} px")
    starts = torch.arange(0, side - cell + 1, stride)
    pixel = torch.arange(side)
    # Along one side: place x pixel. In two dimensions: row place x column place x row x column.
    covered = (starts[:, None] <= pixel) & (pixel < starts[:, None] + cell)
    both = covered[:, None, :, None] & covered[None, :, None, :]
    return torch.where(both.flatten(0, 1), high, low)


def middle_mask(masks: Float[Tensor, "cells s s"]) -> Float[Tensor, "1 s s"]:
    """The middle one of the masks of a square grid of cell positions.

    On an even grid, it is the one below and right of the centre.

    >>> middle_mask(cell_masks(3, 1, 1, 0.0, 1.0)).nonzero().tolist()
    [[0, 1, 1]]
    """
    positions = round(len(masks) ** 0.5)
    middle = positions // 2
    return masks[middle * positions + middle][None]
