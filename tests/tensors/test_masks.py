"""Opacity masks against masks written out."""

import pytest
import torch

from vitrap.tensors.masks import cell_masks


def test_cells_that_tile_the_box() -> None:
    masks = cell_masks(4, 2, 2, 0.25, 1.0)
    assert masks.shape == (4, 4, 4)
    a, b = 0.25, 1.0
    assert masks[0].tolist() == [[b, b, a, a], [b, b, a, a], [a] * 4, [a] * 4]
    assert masks[1].tolist() == [[a, a, b, b], [a, a, b, b], [a] * 4, [a] * 4]
    assert masks[2].tolist() == [[a] * 4, [a] * 4, [b, b, a, a], [b, b, a, a]]


def test_cells_one_pixel_apart() -> None:
    masks = cell_masks(3, 2, 1, 0.0, 0.5)
    assert masks.shape == (4, 3, 3)
    assert masks[3].tolist() == [[0, 0, 0], [0, 0.5, 0.5], [0, 0.5, 0.5]]


def test_single_pixels_and_what_is_left_over() -> None:
    assert torch.equal(cell_masks(2, 1, 1, 0.0, 1.0).sum(0), torch.ones(2, 2))
    assert len(cell_masks(5, 2, 2, 0.0, 1.0)) == 4  # the fifth row and column hold no whole cell


def test_a_cell_that_is_the_box() -> None:
    assert torch.equal(cell_masks(3, 3, 3, 0.1, 0.7), torch.full((1, 3, 3), 0.7))


@pytest.mark.parametrize("cell", [0, 5])
def test_a_cell_that_does_not_fit_is_refused(cell: int) -> None:
    with pytest.raises(ValueError, match=f"a cell of {cell} px does not fit in a box of 4 px"):
        cell_masks(4, cell, 1, 0.0, 1.0)
