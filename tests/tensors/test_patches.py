"""From tokens to pixels, and which pixels are selected: masks worked by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vitrap.tensors.patches import above_quantile, above_value, tokens_to_pixels, tokens_touched

MAP = torch.tensor([[[1.0, 8.0, 3.0], [6.0, 5.0, 4.0]]])


def shuffled(seed: int, height: int, width: int) -> Tensor:
    """A map in which no two values tie."""
    order = torch.randperm(height * width, generator=torch.Generator().manual_seed(seed))
    return order.view(1, height, width) / 7


def bits(*rows: str) -> Tensor:
    return torch.tensor([[[digit == "1" for digit in row] for row in rows]])


@pytest.mark.parametrize(
    ("level", "wanted"),
    [
        (0.0, bits("111", "111")),
        (1 / 6, bits("011", "111")),
        (0.5, bits("010", "110")),
        (0.7, bits("010", "100")),  # 30 % of six pixels: two
        (5 / 6, bits("010", "000")),
        (1.0, bits("000", "000")),
    ],
)
def test_quantile_by_hand(level: float, wanted: Tensor) -> None:
    assert torch.equal(above_quantile(MAP, level), wanted)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        (0.0, bits("111", "111")),
        (0.125, bits("011", "111")),  # 1 of 8 is not above 0.125
        (0.5, bits("010", "110")),
        (0.75, bits("010", "000")),  # 6 of 8 is not above 0.75
        (1.0, bits("000", "000")),
    ],
)
def test_value_by_hand(value: float, wanted: Tensor) -> None:
    assert torch.equal(above_value(MAP, value), wanted)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(1, 12), st.integers(1, 12), st.floats(0, 1))
def test_the_share_is_exact_where_nothing_ties(seed: int, height: int, width: int, level: float) -> None:
    scores = shuffled(seed, height, width)
    mask = above_quantile(scores, level)
    assert mask.sum() == round((1 - level) * height * width)
    if mask.any() and not mask.all():
        assert scores[mask].min() > scores[~mask].max(), "a lower score was preferred"


def test_pixels_that_tie_with_the_quantile_fall_out_together() -> None:
    scores = torch.tensor([[[1.0, 2.0, 2.0, 2.0, 3.0, 4.0]]])
    assert torch.equal(above_quantile(scores, 0.5), bits("000011"))
    assert torch.equal(above_quantile(scores, 1 / 3), bits("000011"))
    assert torch.equal(above_quantile(scores, 1 / 6), bits("011111"))
    assert not above_quantile(torch.ones(1, 4, 4), 0.7).any()


def test_a_map_of_zeros_selects_nothing() -> None:
    assert not above_value(torch.zeros(1, 4, 4), 0.0).any()
    assert not above_quantile(torch.zeros(1, 4, 4), 0.5).any()


@pytest.mark.parametrize("select", [above_quantile, above_value])
@pytest.mark.parametrize("level", [0.1, 0.5, 0.7, 0.9])
def test_the_maps_scale_and_its_batch_mates_do_not_matter(select, level: float) -> None:
    one, other = shuffled(0, 8, 8), shuffled(1, 8, 8)
    wanted = select(one, level)
    assert 0 < wanted.sum() < 64
    for factor in (2.0**-40, 0.25, 2.0**40):  # powers of two scale without rounding
        assert torch.equal(select(one * factor, level), wanted)
    assert torch.equal(select(torch.cat([other * 1e6, one]), level)[1:], wanted)


@pytest.mark.parametrize("size", [(4, 6), (8, 12), (16, 24)])
def test_nearest_gives_whole_patches(size: tuple[int, int]) -> None:
    tokens = shuffled(0, 4, 6)
    down, across = size[0] // 4, size[1] // 6
    wanted = tokens.repeat_interleave(down, 1).repeat_interleave(across, 2)
    assert torch.equal(tokens_to_pixels(tokens, size, "nearest"), wanted)
    for level in (0.25, 0.5, 0.75):
        patches = above_quantile(wanted, level).unfold(1, down, down).unfold(2, across, across).flatten(3)
        assert torch.equal(patches.all(-1), patches.any(-1)), "a patch is cut"


def test_bilinear_by_hand() -> None:
    """Token centres lie at 0.5 and 2.5 of four pixels whose centres lie at 0, 1, 2, 3; outside them it is flat."""
    found = tokens_to_pixels(torch.tensor([[[1.0, 2.0], [5.0, 6.0]]]), (4, 4), "bilinear")
    row = torch.tensor([0.0, 0.25, 0.75, 1.0])
    torch.testing.assert_close(found[0], 1 + row[None, :] + 4 * row[:, None])


def test_each_image_is_scaled_up_by_itself() -> None:
    tokens = torch.cat([shuffled(s, 3, 3) for s in range(3)])
    for number, alone in enumerate(tokens.split(1)):
        together = tokens_to_pixels(tokens, (9, 9), "bilinear")
        assert torch.equal(tokens_to_pixels(alone, (9, 9), "bilinear")[0], together[number])


@settings(deadline=None, max_examples=100)
@given(st.tuples(*[st.integers(-100, 500)] * 4), st.sampled_from([(4, 4), (2, 8), (1, 1)]))
def test_a_token_is_touched_where_box_and_token_share_area(
    edges: tuple[int, int, int, int], grid: tuple[int, int]
) -> None:
    """Against the area of the overlap, token by token."""
    top, left, bottom, right = box = (edges[0] / 25, edges[1] / 25, edges[2] / 25, edges[3] / 25)
    found = tokens_touched(box, 16, grid)
    for row in range(grid[0]):
        for column in range(grid[1]):
            height, width = 16 / grid[0], 16 / grid[1]
            down = min(bottom, (row + 1) * height) - max(top, row * height)
            across = min(right, (column + 1) * width) - max(left, column * width)
            if top < bottom and left < right:
                assert found[row, column] == (down > 0 and across > 0)


def test_an_edge_on_a_tokens_edge_but_for_rounding_touches_nothing_more() -> None:
    """At 32 px, rows 18 - 4 to 18 + 16 + 4 of 224 are 2 to 5.43: tokens 1 and 2 of 2 px, though 14 * 32 / 224 < 2."""
    scale = 32 / 224
    top, bottom = 18 * scale - 4 * scale, 18 * scale + 16 * scale + 4 * scale
    assert tokens_touched((top, 0.0, bottom, 1.0), 32, (16, 16))[:, 0].nonzero().squeeze(1).tolist() == [1, 2]


def test_a_token_that_the_box_borders_on_is_not_touched() -> None:
    assert tokens_touched((4.0, 4.0, 8.0, 8.0), 16, (4, 4)).nonzero().tolist() == [[1, 1]]
