"""Opacity masks: low over a square box, high on one cell of it."""

import torch
from jaxtyping import Float
from torch import Tensor


def cell_masks(side: int, cell: int, stride: int, low: float, high: float) -> Float[Tensor, "cells side side"]:
    """The mask of every place that a cell can take in a box, row by row.

    Args:
        side: of the box, in pixels.
        cell: side of the square cell, in pixels, at most `side`.
        stride: pixels from one place to the next: `cell` lets the places tile the box, 1 lets them overlap.
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
    covered = (starts[:, None] <= pixel) & (pixel < starts[:, None] + cell)  # place along one side x pixel
    both = covered[:, None, :, None] & covered[None, :, None, :]  # row place, column place, row, column
    return torch.where(both.flatten(0, 1), high, low)


def middle_mask(masks: Float[Tensor, "cells s s"]) -> Float[Tensor, "1 s s"]:
    """The mask of the cell in the middle, or below and right of it, of cells that tile a square.

    >>> middle_mask(cell_masks(3, 1, 1, 0.0, 1.0)).nonzero().tolist()
    [[0, 1, 1]]
    """
    along = round(len(masks) ** 0.5)
    return masks[along // 2 * along + along // 2][None]
