"""One image over another: weights and masks."""

import pytest
import torch
from torch import Tensor

from vitrap.tensors.blend import blend, paste


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("keep", [0.1, 0.25, 0.5, 0.8])
def test_keep_is_the_weight_of_the_original(keep: float) -> None:
    images, other = drawn(0, 2, 3, 4, 5), drawn(1, 2, 3, 4, 5)
    torch.testing.assert_close(blend(images, other, keep), keep * images + (1 - keep) * other)


def test_the_ends_are_exact() -> None:
    images, other = drawn(0, 2, 3, 4, 5), drawn(1, 2, 3, 4, 5)
    assert torch.equal(blend(images, other, 1), images)
    assert torch.equal(blend(images, other, 0), other)


def test_one_picture_is_blended_into_every_image() -> None:
    images, picture = drawn(0, 3, 3, 4, 4), drawn(1, 1, 3, 4, 4)
    found = blend(images, picture, 0.75)
    for number in range(3):
        torch.testing.assert_close(found[number], 0.75 * images[number] + 0.25 * picture[0])


def test_paste_takes_the_other_where_the_mask_is_set_in_every_channel() -> None:
    images, other = drawn(0, 2, 3, 4, 5), drawn(1, 2, 3, 4, 5)
    mask = drawn(2, 2, 4, 5) < 0.5
    found = paste(images, other, mask)
    for channel in range(3):
        assert torch.equal(found[:, channel][mask], other[:, channel][mask])
        assert torch.equal(found[:, channel][~mask], images[:, channel][~mask])


def test_one_picture_and_one_mask_serve_every_image() -> None:
    images, picture = drawn(0, 3, 1, 2, 2), torch.ones(1, 1, 2, 2)
    mask = torch.tensor([[[True, False], [False, False]]])
    found = paste(images, picture, mask)
    assert found[:, 0, 0, 0].eq(1).all()
    assert torch.equal(found.flatten(1)[:, 1:], images.flatten(1)[:, 1:])


def test_the_inputs_stay() -> None:
    images, other, mask = drawn(0, 2, 3, 4, 4), drawn(1, 2, 3, 4, 4), drawn(2, 2, 4, 4) < 0.5
    before = images.clone(), other.clone(), mask.clone()
    blend(images, other, 0.3).zero_()
    paste(images, other, mask).zero_()
    assert all(torch.equal(a, b) for a, b in zip((images, other, mask), before, strict=True))
